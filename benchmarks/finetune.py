"""Single edits by fine-tuning beside EasyEdit's FT: the same model, facts and settings, in one run, one thread.

    git clone https://github.com/zjunlp/EasyEdit REFERENCE          # not part of this project
    python benchmarks/finetune.py REFERENCE --edits 40
    python benchmarks/finetune.py REFERENCE --edits 10 --model FOLDER --layers 20

First the changes are compared, then CPU seconds: theirs, ours one after another, ours side by side. Nothing of the
reference is copied or changed; only its FT is imported, without the rest of the package.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from contextlib import redirect_stdout
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from common import clocked, facts
from rich.console import Console
from rich.table import Table
from torch import Tensor

from edit_cli.editors.finetune.ft import FT, FTConfig
from edit_cli.lm.loading import ModelOptions
from edit_cli.lm.model import LM
from edit_cli.requests import EditRequest

Changes = list[dict[str, Tensor]]  # of each edit, by parameter


def imported(folder: Path) -> tuple[Any, Any]:
    """(their `execute_ft`, their class of settings); the packages above it are entered without being run."""
    if not (folder / "easyeditor" / "models" / "ft" / "ft_main.py").is_file():
        raise SystemExit(f"{folder} is no clone of https://github.com/zjunlp/EasyEdit")
    for name in ("easyeditor", "easyeditor.models", "easyeditor.models.ft", "easyeditor.util"):
        package = ModuleType(name)
        package.__path__ = [str(folder.joinpath(*name.split(".")))]
        sys.modules[name] = package
    found = import_module("easyeditor.models.ft.ft_main")
    return found.execute_ft, found.FTHyperParams


def theirs(folder: Path, lm: LM, config: FTConfig, requests: list[EditRequest]) -> Changes:
    execute, settings = imported(folder)
    templates = dict.fromkeys(
        ("layer_module_tmp", "mlp_module_tmp", "attn_module_tmp", "ln_f_module", "lm_head_module"), ""
    )
    (layer,) = config.layers
    hparams = settings(
        **templates, layers=[layer], num_steps=config.steps, lr=config.lr, weight_decay=0.0, kl_factor=0.0,
        norm_constraint=config.norm_constraint, rewrite_module_tmp=f"{lm.layout.mlp_out(layer)}.weight",
        device="cpu", alg_name="FT", model_name=lm.name, objective_optimization="target_new",
    )  # fmt: skip
    with redirect_stdout(io.StringIO()):
        return [
            execute(lm.model, lm.tokenizer, [{"prompt": request.text, "target_new": request.target_new}], hparams)
            for request in requests
        ]


def one_by_one(lm: LM, config: FTConfig, requests: list[EditRequest]) -> Changes:
    return [dict(FT(config, lm).edit([request]).updates) for request in requests]  # type: ignore[arg-type]


def side_by_side(lm: LM, config: FTConfig, requests: list[EditRequest]) -> Changes:
    made = FT(config, lm).edit_each([[request] for request in requests])
    assert made is not None
    return [dict(edit.updates) for edit in made]  # type: ignore[arg-type]


def furthest(mine: Changes, others: Changes) -> float:
    """The largest relative difference of two changes."""
    return max(
        float((one[name] - change).norm() / change.norm())
        for one, other in zip(mine, others, strict=True)
        for name, change in other.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path)
    parser.add_argument("--edits", type=int, default=40)
    parser.add_argument("--model", default="embedded:tiny-gpt2")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 3, 5], help="one after the other")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lm = ModelOptions(name="tiny-gpt2" if "embedded" in options.model else "model", id=options.model).load()
    lm.model.float()
    lm.tokenizer.pad_token = lm.tokenizer.pad_token or lm.tokenizer.eos_token
    requests = facts(options.edits)
    table = Table("layer", "norm", "EasyEdit, CPU s", "one by one", "side by side", "ratios", "furthest change")
    for layer in options.layers:
        for bound in (None, 1e-3):
            config = FT.Config(layers=[layer], norm_constraint=bound)
            one_by_one(lm, config, requests[:1])
            their, (seconds, _) = clocked(partial(theirs, options.reference, lm, config, requests))
            ours, (alone, _) = clocked(partial(one_by_one, lm, config, requests))
            both, (together, _) = clocked(partial(side_by_side, lm, config, requests))
            table.add_row(
                str(layer), str(bound), f"{seconds:.2f}", f"{alone:.2f}", f"{together:.2f}",
                f"{seconds / alone:.1f}, {seconds / together:.1f}",
                f"{furthest(ours, their):.1e}, {furthest(both, their):.1e}",
            )  # fmt: skip
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
