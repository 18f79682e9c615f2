"""Tiny random models and a short text, for the tests of the second moments."""

from __future__ import annotations

import random
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from edit_cli.lm.model import LM
from edit_cli.monitor import Monitor
from edit_cli.statistics.corpora import TextFile
from edit_cli.statistics.moments import MomentStore

WORDS = (
    "the old ship of a small town went down in cold rain and no one who had seen it told what they knew about its"
    " captain".split()
)


def texts(count: int = 60) -> list[str]:
    """Documents of 3 to 30 words, the same at every call."""
    choose = random.Random(0)
    return [" ".join(choose.choices(WORDS, k=choose.randint(3, 30))) for _ in range(count)]


def tokenizer(add_bos: bool) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>"], show_progress=False, initial_alphabet=alphabet
    )
    inner.train_from_iterator(texts(), trainer)
    if add_bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="<s>", pad_token="<s>")


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(n_layer=3, n_embd=16, n_head=2, n_positions=64, vocab_size=300, initializer_range=0.3)
    )


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=3,
            hidden_size=16,
            intermediate_size=40,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            vocab_size=300,
            initializer_range=0.3,
        )
    )


class Recorder(Monitor):
    """Keeps what it is told. `give_up_after`: raise, as a killed process would stop, after that much progress."""

    def __init__(self, give_up_after: int | None = None) -> None:
        super().__init__()
        self.notes: list[str] = []
        self.tasks: list[tuple[str, int | None]] = []
        self.advanced = 0
        self.give_up_after = give_up_after

    @contextmanager
    def task(self, description, total):
        self.tasks.append((description, total))

        def advance(steps: int) -> None:
            self.advanced += steps
            if self.give_up_after is not None and self.advanced >= self.give_up_after:
                raise KeyboardInterrupt

        yield advance

    def note(self, message: str) -> None:
        self.notes.append(message)


class RecordedLM(LM):
    """A model whose monitor keeps what it is told."""

    monitor: Recorder


def language_model(
    family: str, seed: int = 0, dtype: torch.dtype = torch.float32, name: str | None = None
) -> RecordedLM:
    model: Any = {"gpt2": gpt2, "llama": llama}[family](seed)
    model.to(dtype)
    return RecordedLM(model, tokenizer(add_bos=family == "llama"), name or f"tiny-{family}", monitor=Recorder())


def corpus_file(directory: Path, lines: list[str] | None = None) -> TextFile:
    path = directory / "corpus.txt"
    path.write_text("\n".join(lines or texts()) + "\n")
    return TextFile(str(path))


def store(directory: Path, **fields) -> MomentStore:
    corpus = fields.pop("corpus", None) or corpus_file(directory)
    return MomentStore(
        **{"corpus": corpus, "documents": None, "batch_tokens": 100, "cache_dir": str(directory / "cache"), **fields}
    )
