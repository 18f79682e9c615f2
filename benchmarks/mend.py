"""Training MEND beside its authors' implementation: the same model, edits and settings, in one run, one thread.

    git clone https://github.com/eric-mitchell/mend REFERENCE       # not part of this project
    python benchmarks/mend.py REFERENCE --edits 64

First the update of both is compared, for the same weights of the networks; then edits trained a second and peak memory,
each in a process of its own: theirs one edit at a time, ours one at a time, and ours with independent edits in one
batch. What the frozen model says of a prompt is kept by ours, so that epochs after the first cost less: both are shown,
and a whole training of eight epochs, which draws anew in each as trainings do. Nothing of the reference is copied or
changed; the one function that it takes from a fork of `higher` (a model in which some weights are exchanged without a
copy) is stood in for by torch.func.functional_call.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from edit_cli.datasets.world import WorldEdits
from edit_cli.editors.meta.episodes import EpisodeConfig, Locality, sample_episodes
from edit_cli.editors.meta.factored_gradients import gradients
from edit_cli.editors.meta.hypernetwork import LowRankLayer
from edit_cli.editors.meta.mend import MEND, MENDConfig
from edit_cli.lm.loading import ModelOptions
from edit_cli.lm.model import LM
from edit_cli.lm.tokenization import pad_right

LOCALITY: list[Locality] = ["random", "random", "same_relation"]
WHOLE, EPOCHS = 0, 8
RANK, EVERY = 128, 10  # of the networks; edits a step of the optimizer, where they come one at a time


def editor(lm: LM) -> MEND:
    draw = EpisodeConfig(locality=LOCALITY)
    return MEND(MENDConfig(layers=[3, 4, 5], rank=RANK, spread=0.04, step_size=1e-3, draw=draw), lm)


def loaded() -> LM:
    lm = ModelOptions(name="tiny-gpt2", id="embedded:tiny-gpt2", device="cpu").load()
    lm.model.float()
    return lm


class Exchanged(torch.nn.Module):
    """A model in which other tensors stand for its parameters: what `higher`'s monkeypatch(model, in_place=True)
    gives.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.handles = model.handles
        self.inside = [model]  # in a list: its parameters are no longer this one's
        self.fast: dict[str, Tensor] = dict(model.named_parameters())

    def named_parameters(self, *_: Any, **__: Any) -> Any:  # type: ignore[override]
        return iter(self.fast.items())

    def update_params(self, values: list[Tensor]) -> None:
        self.fast = dict(zip(self.fast, values, strict=True))

    def forward(self, **inputs: Any) -> Any:
        return torch.func.functional_call(self.inside[0], self.fast, kwargs=inputs)


def stand_in_for_higher() -> None:
    patch = ModuleType("higher.patch")
    patch.monkeypatch, patch._MonkeyPatchBase = lambda model, in_place: Exchanged(model), Exchanged  # type: ignore[attr-defined]
    higher = ModuleType("higher")
    higher.patch = patch  # type: ignore[attr-defined]
    sys.modules |= {"higher": higher, "higher.patch": patch}


def reference(folder: Path, lm: LM) -> Any:
    """Their MEND around a copy of the model."""
    if not (folder / "algs" / "mend.py").is_file():
        raise SystemExit(f"{folder} is no clone of https://github.com/eric-mitchell/mend")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    stand_in_for_higher()
    from algs.mend import MEND as Theirs

    weights = [f"{name}.weight" for name in editor(lm).modules]
    network = {
        "n_hidden": 1, "init": "id", "norm": True, "combine": True, "x_only": False, "delta_only": False,
        "one_sided": False, "act": "relu",
        "rank": RANK, "mlp_class": "IDMLP", "shared": True,
    }  # fmt: skip
    config = SimpleNamespace(
        model=SimpleNamespace(name="gpt2", inner_params=weights), mend=SimpleNamespace(**network), edit_lr=1e-3
    )
    for name, parameter in lm.model.named_parameters():
        parameter.requires_grad_(name in weights)
    return Theirs(lm.model, config, lambda: None)


def batch(lm: LM, pairs: list[tuple[str, str]]) -> dict[str, Tensor]:
    rows = lm.head.encode(pairs)
    ids, mask = pad_right([row.ids for row in rows], lm.head.pad, lm.device)
    labels = torch.full_like(ids, -100)
    for number, row in enumerate(rows):
        labels[number, row.start : len(row.ids)] = ids[number, row.start : len(row.ids)]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def same_update(folder: Path) -> float:
    """The largest relative difference of the two updates, over modules and five edits."""
    ours, theirs = loaded(), loaded()
    torch.manual_seed(0)
    mine = editor(ours)
    net = mine.build()
    cases = WorldEdits(name="world", split="train").load(40).cases
    mine.loss(net.train(), cases[8:])
    for layer in net.hypernetwork.modules():
        if isinstance(layer, LowRankLayer):
            for parameter in (layer.up, layer.bias, layer.offset):
                torch.nn.init.normal_(parameter, std=0.05)
    net.eval()
    them = reference(folder, theirs).eval()
    them.edit_lrs.data = -net.steps.data
    for d_in, d_out in dict.fromkeys(net.hypernetwork.shapes):
        own, other = net.hypernetwork.transform(f"{d_in}x{d_out}"), them.mend[str((d_in, d_out))]
        assert own.normalizer is not None
        mean, deviation = (
            own.normalizer.mean.float(),
            (own.normalizer.squares / (own.normalizer.count - 1)).sqrt().float(),
        )
        other.u_mean, other.v_mean, other.u_std, other.v_std = (
            mean[:d_in],
            mean[d_in:],
            deviation[:d_in],
            deviation[d_in:],
        )
        for layer, copy in zip(own.layers, other.mlp.layers, strict=True):
            assert isinstance(layer, LowRankLayer)
            copy.u.data, copy.v.data, copy.bias.data = layer.up.data, layer.down.data, layer.bias.data
            copy.mode_scale.weight.data, copy.mode_shift.weight.data = layer.scale.data, layer.offset.data
    worst = 0.0
    for case in cases[:5]:
        pair = (case.requests[0].text, case.requests[0].target_new)
        before = {name: parameter.detach().clone() for name, parameter in theirs.model.named_parameters()}
        edited, _ = them.edit(batch(theirs, [pair]))
        after = dict(edited.model.named_parameters())
        shifts = net(gradients(ours, ours.head.encode([pair]), mine.modules), 1)
        for name, shift in shifts.items():
            found, expected = shift.right[0].T @ shift.left[0], after[f"{name}.weight"] - before[f"{name}.weight"]
            # the difference of two float32 weights has their rounding in it
            worst = max(worst, float((found - expected).norm() / expected.norm()))
    return worst


def measure(kind: str, folder: str, count: int, per_batch: int, epoch: int) -> dict[str, float]:
    """epoch: 1, 2 if every prompt has been seen before, or WHOLE.

    Edits trained a second and peak memory (MiB above what loading took).
    """
    torch.set_num_threads(1)
    lm = loaded()
    torch.manual_seed(0)
    cases = list(WorldEdits(name="world", split="train").load().cases)
    work = _theirs(Path(folder), lm) if kind == "theirs" else _ours(lm)
    chunks = [cases[i % len(cases) : i % len(cases) + per_batch] for i in range(0, count + per_batch, per_batch)]
    for chunk in chunks[: len(chunks) if epoch == 2 else 1]:
        work(chunk, True)
    base, cpu, wall = _peak(), time.process_time(), time.perf_counter()
    epochs = EPOCHS if epoch == WHOLE else 1
    for seed in range(epochs):
        torch.manual_seed(seed)
        for number, chunk in enumerate(chunks[1:], 1):
            work(chunk, (number * per_batch) % EVERY == 0 or per_batch > 1)
    trained = epochs * sum(map(len, chunks[1:]))
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {
        "edits_per_cpu_s": trained / cpu,
        "edits_per_s": trained / wall,
        "peak_mib": _peak(),
        "grown_mib": _peak() - base,
    }


def _ours(lm: LM) -> Any:
    mine = editor(lm)
    net = mine.build().train()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4)

    def work(cases: list[Any], step: bool) -> None:
        mine.loss(net, cases)[0].backward()
        if step:
            torch.nn.utils.clip_grad_norm_(net.parameters(), 100.0)
            optimizer.step()
            optimizer.zero_grad()

    return work


def _theirs(folder: Path, lm: LM) -> Any:
    """One training step as their trainer takes it: locality before, edit, loss on the rephrased prompt, locality
    after.
    """
    them = reference(folder, lm).train()
    from losses import kl_loc_loss, masked_log_probs

    optimizer = torch.optim.Adam(them.outer_parameters(), lr=1e-4)

    def work(cases: list[Any], step: bool) -> None:
        for episode in sample_episodes(cases, 1, EpisodeConfig(locality=LOCALITY)):
            sides = (episode.support, episode.query, episode.locality)
            support, query, locality = (batch(lm, list(pairs)) for pairs in sides)
            with torch.no_grad():
                before = them(**locality)
            edited, _ = them.edit(support)
            nll = masked_log_probs(edited(**query), query["labels"], shift=True)["nll"]
            after = edited(**locality)
            mask = locality["labels"][:, 1:] != -100
            loss = 0.1 * nll + kl_loc_loss(
                before[:, :-1].contiguous(), after[:, :-1].contiguous(), mask=mask.contiguous()
            )
            loss.backward()
        if step:
            torch.nn.utils.clip_grad_norm_(them.outer_parameters(), 100.0)
            optimizer.step()
            optimizer.zero_grad()

    return work


def _peak() -> float:
    """MiB. Linux hands the parent's `ru_maxrss` on to a new process, but not its VmHWM."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024)


def apart(*arguments: Any) -> dict[str, float]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path)
    parser.add_argument("--edits", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    folder = options.reference.resolve()
    report: dict[str, Any] = {"largest_relative_difference_of_updates": same_update(folder), "runs": []}
    theirs = apart("theirs", str(folder), options.edits, 1, 1)
    table = Table("", "edits / CPU second", "times theirs", "peak MiB")
    table.add_row("reference, one at a time", f"{theirs['edits_per_cpu_s']:.1f}", "1", f"{theirs['peak_mib']:.0f}")
    report["runs"].append({"who": "reference", "batch": 1, **theirs})
    for size in options.batches:
        for epoch, name in ((1, "new prompts"), (2, "prompts seen before"), (WHOLE, f"{EPOCHS} epochs")):
            found = apart("ours", str(folder), max(options.edits, 4 * size), size, epoch)
            report["runs"].append({"who": "ours", "batch": size, "prompts": name, **found})
            ratio = found["edits_per_cpu_s"] / theirs["edits_per_cpu_s"]
            table.add_row(
                f"ours, {size} in a batch, {name}",
                f"{found['edits_per_cpu_s']:.1f}",
                f"{ratio:.2f}",
                f"{found['peak_mib']:.0f}",
            )
    console = Console()
    console.print(f"largest relative difference of the updates: {report['largest_relative_difference_of_updates']:.2e}")
    console.print(table)
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
