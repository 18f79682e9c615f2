"""What the benchmarks share: a random model, facts, clocks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

from edit_cli.datasets.counterfact import CounterFact
from edit_cli.lm.model import LM
from edit_cli.lm.model_files import packaged
from edit_cli.requests import Case, EditRequest

LAYERS = [0, 1, 2, 3]
Found = TypeVar("Found")


def random_model(width: int = 256, depth: int = 6) -> LM:
    """A GPT-2 that has learned nothing, with the embedded tokenizer: no optimization on it stops early."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(packaged("embedded:tiny-gpt2"))
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = GPT2Config(n_layer=depth, n_embd=width, n_head=4, vocab_size=len(tokenizer), n_positions=256, **ends)
    config.activation_function = "gelu_pytorch_tanh"  # the fused form of GPT-2's own
    return LM(GPT2LMHeadModel(config), tokenizer, f"random-gpt2-{depth}x{width}")


def records() -> list[Case]:
    """The embedded world's records that are kept for tests."""
    logging.set_verbosity_error()
    return list(CounterFact(name="counterfact", records="world", split="test").load().cases)


def facts(count: int) -> list[EditRequest]:
    """`count` facts; beyond what the world has they come again."""
    requests = [case.requests[0] for case in records()]
    return [requests[i % len(requests)] for i in range(count)]


def clocked(work: Callable[[], Found]) -> tuple[Found, tuple[float, float]]:
    """(what it returns, (CPU seconds of all threads, wall seconds))."""
    cpu, wall = time.process_time(), time.perf_counter()
    found = work()
    return found, (time.process_time() - cpu, time.perf_counter() - wall)
