"""A long sequence with a memory (GRACE by default), saved step by step, taken up in a new process, asked, and taken off
again.

    python benchmarks/memory_round_trip.py
    python benchmarks/memory_round_trip.py --method wise --facts 100

The second process loads the model and every saved edit, gives the logits of the whole world's prompts, and takes the
edits off. Told are sizes and seconds, and whether the logits and afterwards every weight are the same bits as in the
first process.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from hydra import compose, initialize_config_module
from safetensors.torch import load_file, save_file

from edit_cli.config.build import register_resolvers
from edit_cli.datasets.world import WorldEdits
from edit_cli.editors.base import Method
from edit_cli.edits import store as edit_store
from edit_cli.experiment.setup import method_of
from edit_cli.lm.loading import ModelOptions
from edit_cli.lm.model import LM
from edit_cli.monitor import Monitor


def model() -> LM:
    return ModelOptions(name="tiny-gpt2", id="embedded:tiny-gpt2").load(Monitor())


def settings(method: str, folder: Path) -> Method:
    register_resolvers()
    with initialize_config_module("edit_cli.conf", version_base="1.3"):
        return method_of(compose("sequential", [f"method={method}", f"cache_dir={folder}"]).method)


def answers(lm: LM, facts: int) -> dict[str, torch.Tensor]:
    """Log-probabilities at the targets of edited prompts, other wordings and what must stay."""
    cases = WorldEdits(name="world", split="all", shuffle_seed=0).load(facts).cases
    pairs = [(probe.prompt, probe.target) for case in cases for probe in case.probes if probe.target is not None]
    found = lm.target_logprobs(pairs)
    return {str(number): logprobs.contiguous() for number, logprobs in enumerate(found) if logprobs is not None}


def make(folder: Path, method: str, facts: int) -> None:
    lm, spent = model(), {"edit": 0.0, "save": 0.0}
    editor = settings(method, folder).begin(lm)
    before = lm.fingerprint()
    for number, case in enumerate(WorldEdits(name="world", split="all", shuffle_seed=0).load(facts).cases):
        began = time.perf_counter()
        edit = editor.edit(case.requests)
        spent["edit"] += time.perf_counter() - began
        began = time.perf_counter()
        edit_store.save(edit, folder / "edits" / f"{number:05d}", lm, case.requests, {"name": method})
        spent["save"] += time.perf_counter() - began
        lm.attach(edit)
    save_file(answers(lm, facts), folder / "first.safetensors")
    size = sum(file.stat().st_size for file in (folder / "edits").rglob("*") if file.is_file())
    print(
        f"{facts:,} edits by {method}: {1000 * spent['edit'] / facts:.1f} ms an edit,"
        f" {1000 * spent['save'] / facts:.1f} ms to save it"
    )
    print(f"on disk: {size / 1e6:.1f} MB, {size / 1e3 / facts:.1f} KB an edit")
    (folder / "fingerprint").write_text(before)


def take_up(folder: Path, facts: int) -> None:
    lm = model()
    began = time.perf_counter()
    for path in sorted((folder / "edits").iterdir()):
        lm.attach(edit_store.load(path, lm))
    print(f"in a new process: loaded and attached in {time.perf_counter() - began:.2f} s")
    first, again = load_file(folder / "first.safetensors"), answers(lm, facts)
    print(
        f"log-probabilities of {len(first):,} answers:"
        f" {'the same bits' if all(torch.equal(first[key], again[key]) for key in first) else 'NOT the same'}"
    )
    began = time.perf_counter()
    while lm.attached:
        lm.detach()
    spent, same = time.perf_counter() - began, lm.fingerprint() == (folder / "fingerprint").read_text()
    print(f"taken off in {spent:.2f} s; every weight is {'the same bits as before' if same else 'NOT what it was'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="grace")
    parser.add_argument("--facts", type=int, default=1000)
    parser.add_argument("--again", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.again:
        take_up(options.again, options.facts)
        return
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), options.method, options.facts)
        subprocess.run([sys.executable, __file__, "--facts", str(options.facts), "--again", folder], check=True)


if __name__ == "__main__":
    main()
