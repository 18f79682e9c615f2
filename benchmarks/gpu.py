"""MEMIT on a model of GPT-J's size, on a GPU: seconds by phase, and what share of the card's matrix rate each reaches.

    python benchmarks/gpu.py                                   # 1,000 and 10,000 edits, float32 by TF32
    python benchmarks/gpu.py --dtype bfloat16 --edits 1000
    python benchmarks/gpu.py --products float32                # without TF32
    python benchmarks/gpu.py --tiny                            # the same steps on a small model and the processor

The weights are random, so no optimization stops early: times are upper bounds. Operations are counted by torch on a few
edits and scaled; the matrix rate is measured first, on square products in the same arithmetic. Prints a table and
writes it as JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Found, facts, records
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, GPTJConfig, GPTJForCausalLM

from edit_cli.editors.locate.memit import MEMIT, MEMITConfig
from edit_cli.editors.locate.value_optimization import ValueConfig
from edit_cli.lm.model import LM
from edit_cli.lm.model_files import packaged
from edit_cli.metrics.observe import ObserveOptions, observe
from edit_cli.statistics.corpora import EmbeddedText
from edit_cli.statistics.moments import MomentStore

SAMPLE = 8  # edits and cases that operations are counted on
MEASURED = 20  # products that the rate is measured on


@dataclass(frozen=True)
class Row:
    """One phase. share: of the measured matrix rate; None where no operations were counted."""

    what: str
    seconds: float
    tera: float | None = None
    share: float | None = None


def random_gptj(device: str, dtype: torch.dtype, tiny: bool) -> LM:
    """GPT-J-6B's shape (28 blocks of width 4,096), or 4 blocks of width 64, with the embedded tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(packaged("embedded:tiny-gpt2"))
    ends: dict[str, Any] = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    shape: dict[str, Any] = (
        {"n_layer": 4, "n_embd": 64, "n_head": 4, "rotary_dim": 8, "vocab_size": len(tokenizer)} if tiny else {}
    )
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = GPTJForCausalLM(GPTJConfig(**shape, **ends))
    return LM(model.to(dtype), tokenizer, "random-gpt-j")


def clocked(device: str, work: Callable[[], Found]) -> tuple[Found, float]:
    """(what it returns, seconds until the device is done with it)."""
    settle = torch.cuda.synchronize if device == "cuda" else lambda: None
    settle()
    began = time.perf_counter()
    found = work()
    settle()
    return found, time.perf_counter() - began


def matrix_rate(device: str, dtype: torch.dtype, width: int) -> float:
    """Tera-operations a second of square products in the arithmetic that is set."""
    left = torch.randn(width, width, device=device, dtype=dtype)
    clocked(device, lambda: left @ left)
    _, seconds = clocked(device, lambda: [left @ left for _ in range(MEASURED)])
    return 2 * width**3 * MEASURED / seconds / 1e12


def counted(work: Callable[[], object]) -> float:
    """Tera-operations of matrix products."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e12


def run(options: argparse.Namespace) -> list[Row]:
    """All phases in turn; every number of edits is made anew on the same, unedited model."""
    device, dtype = "cpu" if options.tiny else "cuda", getattr(torch, options.dtype)
    torch.backends.cuda.matmul.fp32_precision = "tf32" if options.products == "tf32" else "ieee"
    rate = matrix_rate(device, dtype, 512 if options.tiny else 8192)
    rows = [Row(f"matrix rate, {options.dtype} ({options.products}): {rate:.3g} T/s", 0.0, share=1.0)]

    def add(what: str, seconds: float, tera: float | None = None) -> None:
        rows.append(Row(what, seconds, tera, None if tera is None else tera / seconds / rate))

    lm = random_gptj(device, dtype, options.tiny)
    layers = [0, 1, 2] if options.tiny else [3, 4, 5, 6, 7, 8]  # as published for GPT-J
    with tempfile.TemporaryDirectory() as folder:
        store = MomentStore(corpus=EmbeddedText(), tokens=options.tokens, cache_dir=folder)
        config = MEMITConfig(
            layers=layers,
            covariance_weight=15_000.0,
            value=ValueConfig(steps=25, lr=0.5, clamp_norm_factor=0.75),
            moments=store,
        )
        editor = MEMIT(config, lm)
        _, seconds = clocked(device, lambda: editor.covariances(layers))
        add(f"second moments of {len(layers)} layers, {options.tokens:,} tokens", seconds)
        _ = editor.contexts
        an_edit = counted(lambda: editor.edit(facts(SAMPLE))) / SAMPLE
        for count in options.edits:
            before = dict(lm.monitor.seconds)
            edit, seconds = clocked(device, partial(editor.edit, facts(count)))
            add(f"{count:,} edits at once", seconds, an_edit * count)
            for phase, total in lm.monitor.seconds.items():
                if total > before.get(phase, 0.0):
                    rows.append(Row(f"  of which {phase}", total - before.get(phase, 0.0)))
    cases = (records() * (options.asked // len(records()) + 1))[: options.asked]
    asking = ObserveOptions(sample=False, max_new_tokens=8)
    with lm.edited(edit):
        a_case = counted(lambda: observe(lm, cases[:SAMPLE], asking)) / SAMPLE
        _, seconds = clocked(device, lambda: observe(lm, cases, asking))
    add(f"asking about {len(cases):,} facts", seconds, a_case * len(cases))
    if device == "cuda":
        rows.append(Row(f"peak memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB", 0.0))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, nargs="+", help="numbers of edits; 1,000 and 10,000, tiny: 10")
    parser.add_argument("--tokens", type=int, help="for second moments; 100,000, tiny: 2,000")
    parser.add_argument("--asked", type=int, help="facts that are asked about; 1,000, tiny: 10")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--products", choices=("tf32", "float32"), default="tf32", help="how float32 is multiplied")
    parser.add_argument("--tiny", action="store_true", help="a small model on the processor: shows that it runs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/gpu.json"))
    options = parser.parse_args()
    options.edits = options.edits or ([10] if options.tiny else [1000, 10_000])
    options.tokens = options.tokens or (2_000 if options.tiny else 100_000)
    options.asked = options.asked or (10 if options.tiny else 1000)
    if not options.tiny and not torch.cuda.is_available():
        parser.error("no GPU: give --tiny to see it run on the processor")
    rows = run(options)
    table = Table("what", "seconds", "10¹² operations", "share of the rate", title="MEMIT on a GPT-J of random weights")
    for row in rows:
        tera, share = ("" if value is None else f"{value:.3g}" for value in (row.tera, row.share))
        table.add_row(row.what, f"{row.seconds:.2f}" if row.seconds else "", tera, share)
    Console(width=120).print(table)
    options.out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
