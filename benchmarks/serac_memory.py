"""What a query costs SERAC with 1, 100 and 10,000 stored facts, measured in turn in one run, one thread.

    python benchmarks/serac_memory.py

The networks have the sizes of conf/tuned/serac/tiny-gpt2.yaml and are not trained: time does not depend on it. Facts
lie far from all that is asked, so that every query is looked up among all of them and then answered by the model,
whatever the memory's size. Facts are stored as they are edited: one edit of 100, and a sequence of 100 edits of 100.
Shown are medians of milliseconds a query: a batch of prompts scored, one prompt scored, one text written, and the
look-up of a batch alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from common import records
from hydra import compose, initialize_config_module
from rich.console import Console
from rich.table import Table

from edit_cli.config.build import register_resolvers
from edit_cli.editors.retrieval.serac import SeracRoute
from edit_cli.experiment.setup import method_of
from edit_cli.lm.loading import ModelOptions
from edit_cli.lm.model import LM
from edit_cli.requests import EditRequest

SIZES = (1, 100, 10_000)
EDIT = 100  # facts edited together
BATCH = 64
FAR = 100.0  # how far facts lie from what is asked


def editor(lm: LM) -> Any:
    """With networks that were not trained."""
    register_resolvers()
    with initialize_config_module("edit_cli.conf", version_base="1.3"):
        serac = method_of(compose("evaluate", ["method=serac"]).method).begin(lm)
    torch.manual_seed(0)
    serac.context.kept["network"] = serac.build().eval().requires_grad_(False)
    return serac


def stored(serac: Any, size: int) -> list[SeracRoute]:
    """Edits of `size` invented facts in all."""
    requests = [EditRequest("{} works as a", f"Person{number} Name{number}", "pilot") for number in range(size)]
    edits = [serac.edit(requests[first : first + EDIT]) for first in range(0, size, EDIT)]
    return [SeracRoute(edit.facts, edit.keys + FAR, edit.maker, edit.config, net=edit.net) for edit in edits]


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return 1000.0 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args()
    torch.set_num_threads(1)
    lm = ModelOptions(name="tiny-gpt2", id="embedded:tiny-gpt2", device="cpu").load()
    serac = editor(lm)
    prompts = [probe.prompt for case in records() for probe in case.probes if probe.kind == "paraphrase"][:BATCH]
    pairs = [(prompt, "London") for prompt in prompts]
    start = time.process_time()
    edits = {size: stored(serac, size) for size in SIZES}
    spent = 1000.0 * (time.process_time() - start) / sum(SIZES)

    def look_up() -> Any:
        route = lm.attached[-1]
        assert isinstance(route, SeracRoute)
        return route.answers(lm.head, prompts)

    work: dict[str, tuple[int, Callable[[], Any]]] = {
        f"{BATCH} prompts scored together": (BATCH, lambda: lm.loglikelihood(pairs)),
        "one prompt scored": (1, lambda: lm.loglikelihood(pairs[:1])),
        "one text of 20 tokens written": (1, lambda: lm.generate(prompts[:1], 20)),
        f"look-up alone, {BATCH} together": (BATCH, look_up),
    }
    times: dict[tuple[str, int], list[float]] = {(name, size): [] for name in work for size in SIZES}
    for size in SIZES * (1 + given.repeats):
        with ExitStack() as undo:
            for edit in edits[size]:
                undo.enter_context(lm.edited(edit))
            for name, (count, ask) in work.items():
                times[name, size].append(timed(ask) / count)
    table = Table("milliseconds a query", *(f"{size:,} stored" for size in SIZES), "last : first")
    for name in work:
        middle = [statistics.median(times[name, size][1:]) for size in SIZES]  # the first time warms up
        table.add_row(name, *(f"{value:.2f}" for value in middle), f"{middle[-1] / middle[0]:.2f}")
    Console(width=140).print(table, f"storing a fact: {spent:.2f} ms of CPU time (in edits of {EDIT})")


if __name__ == "__main__":
    main()
