"""Our fast paths against the plain ones, and how the cost of MEMIT grows. Ratios come from one run; absolute times are this machine's.

    make bench                                   # or: python benchmarks/bench.py --edits 100 --out benchmarks/results.json
    python benchmarks/bench.py --growth 1 10 100 1000

The model is a random GPT-2 (6 layers, width 256) with the embedded tokenizer; the facts are those of the embedded world.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import torch
from oracle import plain_value
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from edit_cli.corpora import EmbeddedText
from edit_cli.datasets.counterfact import CounterFact
from edit_cli.editors.contexts import BARE, ContextOptions, rows_in_contexts
from edit_cli.editors.memit import MEMIT
from edit_cli.editors.solver import Covariance, solve
from edit_cli.editors.values import ValueOptions, optimise_values
from edit_cli.lm.loading import packaged
from edit_cli.lm.model import LM
from edit_cli.lm.reading import Ascent, Tap, read
from edit_cli.requests import EditRequest
from edit_cli.stats import MomentStore

LAYERS = [0, 1, 2, 3]


def random_model(width: int = 256, depth: int = 6) -> LM:
    """A GPT-2 that has learnt nothing: speed does not depend on what the weights are."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(packaged("embedded:tiny-gpt2"))
    config = GPT2Config(n_layer=depth, n_embd=width, n_head=4, vocab_size=len(tokenizer), n_positions=128)
    return LM(GPT2LMHeadModel(config), tokenizer, f"random-gpt2-{depth}x{width}")


def clocked(work: Callable[[], Any]) -> tuple[float, float]:
    """(CPU seconds, wall seconds)."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def value_optimisation(lm: LM, requests: list[EditRequest]) -> dict[str, float]:
    contexts, options = ContextOptions().build(lm), ValueOptions(stop_loss=0.0)
    some = requests[:5]
    plain, _ = clocked(lambda: [plain_value(lm, request, LAYERS[-1], "block", options, contexts) for request in some])
    fast, _ = clocked(lambda: optimise_values(lm, requests, LAYERS[-1], "block", options, contexts))
    return {"plain": plain / len(some) * len(requests), "fast": fast}


def keys_and_states(lm: LM, requests: list[EditRequest]) -> dict[str, float]:
    contexts = ContextOptions().build(lm)

    def plain() -> None:
        for layer in LAYERS:
            for which, tap in ((contexts, Tap(lm.layout.mlp_out(layer), "input")), (BARE, Tap(lm.layout.block(LAYERS[-1]), "output"))):
                read(lm, *rows_in_contexts(lm, requests, which, with_target=False), [tap])

    def fast() -> None:
        in_contexts, bare = (Ascent(lm, *rows_in_contexts(lm, requests, which, with_target=False)) for which in (contexts, BARE))
        for layer in LAYERS:
            for ascent, tap in ((in_contexts, Tap(lm.layout.mlp_out(layer), "input")), (bare, Tap(lm.layout.block(LAYERS[-1]), "output"))):
                ascent.climb(layer)
                ascent.read([tap])

    return {"plain": clocked(plain)[0], "fast": clocked(fast)[0]}


def statistics(lm: LM, tokens: int = 20_000) -> dict[str, float]:
    """All layers in one pass, against one pass a layer."""
    layers = list(range(lm.layout.depth))

    def collect(groups: list[list[int]]) -> float:
        with tempfile.TemporaryDirectory() as folder:
            return clocked(lambda: [MomentStore(EmbeddedText(), tokens=tokens, cache_dir=folder).collect(lm, group) for group in groups])[0]

    return {"plain": collect([[layer] for layer in layers]), "fast": collect([layers])}


def linear_algebra(count: int = 50, width: int = 2048, batches: int = 3) -> dict[str, float]:
    """The m × m form at every batch, against the n × n form with one factorisation."""
    keys, residual = torch.randn(width, count, dtype=torch.float64), torch.randn(256, count, dtype=torch.float64)
    sample = torch.randn(width, 2 * width, dtype=torch.float64)
    covariance = Covariance(sample @ sample.T / (2 * width))
    times = {form: clocked(lambda form=form: [solve(residual, keys, covariance, 100.0, form) for _ in range(batches)])[0] for form in ("primal", "dual")}
    return {"plain": times["primal"], "fast": times["dual"]}


def evaluation(lm: LM, cases: list) -> dict[str, float]:
    pairs = [(p.prompt, x) for case in cases for p in case.probes if p.target for x in (p.target, p.foil) if x]
    some = pairs[: len(pairs) // 10]
    plain, _ = clocked(lambda: [lm.loglikelihood([pair]) for pair in some])
    return {"plain": plain * len(pairs) / len(some), "fast": clocked(lambda: lm.loglikelihood(pairs))[0]}


def growth(requests: list[EditRequest], counts: list[int]) -> list[dict[str, float]]:
    """MEMIT by number of edits, and at 100 edits by width and by layers."""
    rows = []
    settings = [(n, 256, LAYERS) for n in counts] + [(100, w, LAYERS) for w in (128, 512)] + [(100, 256, [3]), (100, 256, [2, 3])]
    for count, width, layers in settings:
        lm = random_model(width)
        with tempfile.TemporaryDirectory() as folder:
            editor = MEMIT(layers=layers, covariance_weight=200.0, moments=MomentStore(EmbeddedText(), tokens=5000, cache_dir=folder))
            editor.covariances(lm, layers)
            many = [requests[i % len(requests)] for i in range(count)]
            cpu, wall = clocked(lambda editor=editor, lm=lm, many=many: editor.edit(lm, many))
        seconds = {name: round(value, 3) for name, value in lm.monitor.seconds.items() if name != "statistics"}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        rows.append({"edits": count, "width": width, "layers": len(layers), "cpu_s": cpu, "edits_per_s": count / wall, "peak_mib": peak, **seconds})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=100)
    parser.add_argument("--growth", type=int, nargs="*", default=[1, 10, 100, 1000])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cases = list(CounterFact(name="counterfact", records="world", split="test").load().cases)
    requests = [case.requests[0] for case in cases]
    lm, console = random_model(), Console()
    some = requests[: options.edits]
    measured = {
        f"value optimisation, {len(some)} edits": value_optimisation(lm, some),
        f"keys and states, {len(some)} edits, {len(LAYERS)} layers": keys_and_states(lm, some),
        "second moments, 6 layers": statistics(lm),
        "solve, 3 batches of 50 edits, 2,048 wide": linear_algebra(),
        "scoring, 100 records": evaluation(lm, cases[:100]),
    }
    table = Table("what", "plain, CPU s", "fast, CPU s", "ratio", title=f"{lm.name}, {options.threads} thread(s)")
    for what, times in measured.items():
        table.add_row(what, f"{times['plain']:.2f}", f"{times['fast']:.2f}", f"{times['plain'] / times['fast']:.1f}")
    console.print(table)
    rows = growth(requests, options.growth)
    columns = ["edits", "width", "layers", "cpu_s", "edits_per_s", "peak_mib", "value", "keys", "solve", "apply"]
    table = Table(*columns, title="MEMIT: how the cost grows (peak: of the process so far)")
    for row in rows:
        table.add_row(*(f"{row.get(column, 0):.4g}" for column in columns))
    console.print(table)
    options.out.write_text(json.dumps({"model": lm.name, "threads": options.threads, "measured": measured, "growth": rows}, indent=1))
    console.print(f"written to {options.out}")


if __name__ == "__main__":
    main()
