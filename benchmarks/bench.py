"""Our fast paths against the plain ones, and how the cost of MEMIT grows.

Ratios come from one run; absolute times are this machine's.

    make bench                                                   # all of it; a few minutes
    python benchmarks/bench.py --growth 1 10 100 1000 10000      # 10,000 edits take many minutes on two cores
    python benchmarks/bench.py --only statistics --stats-width 768
    # a GPT-2 that knows the facts: optimizations stop early, as in practice
    python benchmarks/bench.py --only growth --model MODEL

The model is a GPT-2 with random weights (6 layers, width 256; every optimization takes all of its 20 passes) unless
--model names a directory; the facts are those of the embedded world. Results are printed as tables and written as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from common import random_model, records
from growth import Point, measure_apart
from paths import (
    Ratio,
    evaluation,
    fine_tuning,
    keys_and_states,
    linear_algebra,
    running_text,
    scoring,
    single_edits,
    statistics,
    texts,
    value_optimization,
)
from rich.console import Console
from rich.table import Table

PARTS = ("value", "keys", "statistics", "solve", "evaluation", "texts", "single", "finetune", "scoring", "growth")
COLUMNS = (
    "edits",
    "width",
    "layers",
    "cpu_s",
    "wall_s",
    "edits_per_s",
    "mean_steps",
    "peak_mib",
    "value",
    "keys",
    "solve",
    "apply",
)


def compare(parts: list[str], edits: int, stats_width: int, stats_depth: int) -> list[Ratio]:
    lm, cases = random_model(), records()
    requests = [case.requests[0] for case in cases[:edits]]
    work = {
        "value": lambda: [value_optimization(lm, requests)],
        "keys": lambda: [keys_and_states(lm, requests)],
        "statistics": lambda: [statistics(stats_width, stats_depth)],
        "solve": lambda: [linear_algebra()],
        "evaluation": lambda: evaluation(lm, cases[:100]),
        "texts": lambda: texts(cases[:100]),
        "single": lambda: single_edits(cases[:50]) + running_text(),
        "finetune": lambda: fine_tuning(lm, requests[:20]),
        "scoring": lambda: scoring(cases[:20]),
    }
    return [found for part in parts if part in work for found in work[part]()]


def points(counts: list[int], model: str | None, threads: int) -> list[Point]:
    """By number of edits; and, on random weights, at 100 edits by width and by layers written."""
    found = [Point(count, model=model, threads=threads) for count in counts]
    if model is None:
        found += [Point(100, width, threads=threads) for width in (128, 512)]
        found += [Point(100, layers=layers, threads=threads) for layers in ([3], [2, 3])]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}"
    )
    parser.add_argument("--edits", type=int, default=100, help="for value optimization and keys")
    parser.add_argument("--growth", type=int, nargs="*", default=[1, 10, 100, 1000], help="numbers of edits")
    parser.add_argument("--model", help="a GPT-2's directory for the growth with the number of edits")
    parser.add_argument("--stats-width", type=int, default=256)
    parser.add_argument("--stats-depth", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console(width=150)
    ratios = compare(options.only, options.edits, options.stats_width, options.stats_depth)
    if ratios:
        table = Table(
            "what",
            "plain, CPU s",
            "fast, CPU s",
            "ratio",
            "remark",
            title=f"Fast against plain, {options.threads} thread(s)",
        )
        for found in ratios:
            table.add_row(found.what, f"{found.plain:.2f}", f"{found.fast:.2f}", f"{found.ratio:.1f}", found.note)
        console.print(table)
    rows = []
    if "growth" in options.only:
        table = Table(
            *COLUMNS, title="MEMIT: how the cost grows (seconds by phase; peak memory of a process of its own)"
        )
        for point in points(options.growth, options.model, options.threads):
            rows.append(measure_apart(point))
            table.add_row(*(f"{rows[-1].get(column, 0):.4g}" for column in COLUMNS))
        console.print(table)
    report = {
        "threads": options.threads,
        "ratios": [asdict(found) | {"ratio": found.ratio} for found in ratios],
        "growth": rows,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    console.print(f"written to {options.out}")


if __name__ == "__main__":
    main()
