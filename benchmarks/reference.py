"""MEMIT beside its authors' implementation: the same model, records, prefixes and statistics, in one run.

    git clone https://github.com/kmeng01/memit REFERENCE            # not part of this project
    pip install datasets nltk matplotlib pyyaml scikit-learn        # what it imports, beside torch and transformers
    # a trained GPT-2 of 6 layers (about ten minutes), or leave --model out
    python -m tools.tiny_world world --width 256 --out MODEL
    python benchmarks/reference.py REFERENCE --model MODEL/tiny-gpt2 --edits 100 --threads 1
    torchrun --nproc_per_node 2 benchmarks/reference.py REFERENCE --model MODEL/tiny-gpt2 --edits 100 --threads 1 \\
        --their-threads 2

The second gives our side two processes, and theirs, which knows no processes, two threads; CPU seconds are those of all
processes. Without --model the weights are random: no optimization stops early and both sides take all steps. Nothing of
the reference is copied or changed on disk; what it needs to run on a CPU and with today's transformers is put in front
of it here.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.abc
import importlib.machinery
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from common import LAYERS, clocked, facts, random_model
from torch import Tensor

from edit_cli.distributed import SINGLE, join
from edit_cli.editors.locate.context_prefixes import ContextConfig, sample_contexts
from edit_cli.editors.locate.memit import MEMIT, MEMITConfig
from edit_cli.editors.locate.value_optimization import optimize_values
from edit_cli.lm.loading import ModelOptions
from edit_cli.lm.model import LM
from edit_cli.requests import EditRequest
from edit_cli.statistics.corpora import EmbeddedText
from edit_cli.statistics.moments import MomentStore

WEIGHT = 200.0


class OnCPU(importlib.machinery.SourceFileLoader):
    """Reads a module of the reference as if it said "cpu" wherever it says "cuda"."""

    def source_to_code(self, data: bytes, path: str, **options: Any) -> Any:  # type: ignore[override]
        return super().source_to_code(bytes(data).replace(b'"cuda"', b'"cpu"'), path, **options)

    def get_code(self, fullname: str) -> Any:  # never from a cache on disk
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


def import_reference(folder: Path) -> tuple[Any, Any, Any]:
    """(memit.memit_main, memit.compute_z, its class of hyper-parameters)."""
    if not (folder / "memit" / "memit_main.py").is_file():
        raise SystemExit(f"{folder} is no clone of https://github.com/kmeng01/memit")
    hook = importlib.machinery.FileFinder.path_hook((OnCPU, [".py"]))
    inside = str(folder.resolve())
    sys.path_hooks.insert(
        0, lambda path: hook(path) if path.startswith(inside) else (_ for _ in ()).throw(ImportError())
    )
    sys.path.insert(0, inside)
    os.chdir(inside)  # it reads globals.yml from the working directory
    from memit import compute_z, memit_main
    from memit.memit_hparams import MEMITHyperParams

    return memit_main, compute_z, MEMITHyperParams


def blocks_as_tuples(lm: LM) -> None:
    """The reference expects blocks to return tuples, as they did when it was written."""
    for block in lm.model.transformer.h:
        block.register_forward_hook(lambda _, __, output: (output,))
    for module in [*lm.model.transformer.h, lm.model.transformer.ln_f]:
        module.register_forward_pre_hook(
            lambda _, args: (args[0][0], *args[1:]) if args and isinstance(args[0], tuple) else None
        )


class Theirs:
    """The reference's MEMIT with our prefixes and statistics; `values` are the target states of the latest run."""

    def __init__(self, folder: Path, lm: LM, editor: MEMIT, prefixes: Sequence[str]) -> None:
        self.lm = lm
        self.values: list[Tensor] = []
        self.main, _, hyper = import_reference(folder)
        value = editor.config.value
        self.hyper = hyper(
            layers=LAYERS, layer_selection="all", fact_token="subject_last", v_num_grad_steps=value.steps,
            v_lr=value.lr,
            v_loss_layer=lm.layout.depth - 1, v_weight_decay=value.weight_decay,
            clamp_norm_factor=value.clamp_norm_factor,
            kl_factor=value.kl_factor, mom2_adjustment=True, mom2_update_weight=WEIGHT,
            rewrite_module_tmp="transformer.h.{}.mlp.c_proj",
            layer_module_tmp="transformer.h.{}", mlp_module_tmp="transformer.h.{}.mlp",
            attn_module_tmp="transformer.h.{}.attn",
            ln_f_module="transformer.ln_f", lm_head_module="transformer.wte", mom2_dataset="", mom2_n_samples=0,
            mom2_dtype="float32",
        )  # fmt: skip
        templates = [["{}"], [prefix + "{}" for prefix in prefixes]]
        moments = {layer: editor.config.moments.second_moment(lm, layer).matrix.float() for layer in LAYERS}
        self.main.get_context_templates = lambda *_: templates
        self.main.get_cov = lambda model, tokenizer, name, *_, **__: moments[int(name.split(".")[2])]
        optimize = self.main.compute_z

        def compute_z(*arguments: Any) -> Tensor:
            self.values.append(optimize(*arguments).detach())
            return self.values[-1]

        self.main.compute_z = compute_z
        lm.tokenizer.padding_side = "right"
        lm.tokenizer.pad_token = lm.tokenizer.pad_token or lm.tokenizer.eos_token
        blocks_as_tuples(lm)

    def edit(self, requests: Sequence[EditRequest]) -> dict[str, Tensor]:
        """Updates (d_in, d_out) by weight."""
        rows = [
            {
                "case_id": number,
                "prompt": request.prompt,
                "subject": request.subject,
                "target_new": {"str": request.target_new},
            }
            for number, request in enumerate(requests)
        ]
        self.values.clear()
        with contextlib.redirect_stdout(io.StringIO()):
            deltas = self.main.execute_memit(self.lm.model, self.lm.tokenizer, rows, self.hyper)
        return {name: keys.double() @ values.double().T for name, (keys, values) in deltas.items()}


def difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def load(model: str | None) -> LM:
    lm = ModelOptions(name="trained", id=model, device="cpu").load() if model else random_model(256)
    lm.model.float()
    return lm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path, help="a clone of https://github.com/kmeng01/memit")
    parser.add_argument("--model", help="a directory with a GPT-2 (default: random weights, 6 layers, width 256)")
    parser.add_argument("--edits", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1, help="of each of our processes")
    parser.add_argument("--their-threads", type=int, help="of the reference (default: as many as ours)")
    parser.add_argument(
        "--cache", type=Path, default=Path("benchmarks/cache").resolve(), help="where statistics are kept"
    )
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    out = options.out and options.out.resolve()
    torch.set_num_threads(options.threads)
    process_group = join()
    lm, requests = load(options.model), facts(options.edits)
    lm.process_group = process_group
    prefixes = sample_contexts(lm, ContextConfig()).groups[1]
    # the editor adds ". " to given prefixes, and sampled ones end with it
    config = MEMITConfig(
        layers=LAYERS, covariance_weight=WEIGHT, moments=MomentStore(corpus=EmbeddedText(),
        cache_dir=str(options.cache)),
        context=ContextConfig(prefixes=[prefix.removesuffix(". ") for prefix in prefixes]),
    )  # fmt: skip
    editor = MEMIT(config, lm)
    gc.freeze()  # as the commands do
    editor.covariances(LAYERS)
    editor.edit(requests[:3])
    lm.monitor.seconds.clear()
    process_group.gather([0])  # all start at once
    update, (cpu, wall) = clocked(lambda: editor.edit(requests))
    ours = (sum(process_group.gather([cpu])), wall)
    phases = dict(lm.monitor.seconds)
    if not process_group.is_main:
        return
    lm.process_group = SINGLE
    torch.set_num_threads(options.their_threads or options.threads)
    found = optimize_values(lm, requests, LAYERS[-1], "block", config.value, editor.contexts)

    theirs = Theirs(options.reference.resolve(), load(options.model), editor, prefixes)
    theirs.edit(requests[:3])
    expected, reference = clocked(lambda: theirs.edit(requests))
    values = torch.stack(theirs.values, dim=1)
    each = (found.target - values).norm(dim=0) / values.norm(dim=0)
    report = {
        "model": options.model or "random 6x256", "edits": len(requests),
        "processes": process_group.size, "threads": options.threads,
        "their_threads": options.their_threads or options.threads,
        "mean_steps": sum(found.steps) / len(found.steps),
        "cpu_seconds": {"ours": ours[0], "reference": reference[0], "ratio": reference[0] / ours[0]},
        "wall_seconds": {"ours": ours[1], "reference": reference[1], "ratio": reference[1] / ours[1]},
        "phases_ours": {name: round(seconds, 3) for name, seconds in phases.items()},
        "values_relative_difference": {"all": difference(found.target, values), "worst_edit": float(each.max())},
        "updates_relative_difference": {name: difference(update.stored(lm, name), matrix) for name,
        matrix in expected.items()},
    }  # fmt: skip
    print(json.dumps(report, indent=1))
    if out:
        out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
