"""`apply`: bake a weight edit into a plain transformers checkpoint, which needs nothing of ours any more."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from edit_cli import catalog, edit_store
from edit_cli.commands.parts import load_model
from edit_cli.commands.saved_steps import STATE
from edit_cli.config import build
from edit_cli.console import ConsoleMonitor, Screen
from edit_cli.errors import MissingError, UsageError
from edit_cli.jsonfiles import read_json
from edit_cli.lm.loading import ModelOptions
from edit_cli.paths import expanded
from edit_cli.results import EDITS, MANIFEST
from edit_cli.wording import many

WHY_NOT = {
    "module": "it puts a module of its own into the model, which a plain checkpoint cannot hold",
    "route": "it answers in front of the model and changes no weight",
}


def run(directory: Path, out: Path, model: str | None) -> int:
    """Write the edited model and its tokenizer to `out`."""
    paths = edits_of(directory)
    for path in paths:
        kind = edit_store.read_manifest(path)["kind"]
        if kind != "weights":
            why = WHY_NOT.get(kind, f"its kind is {kind}")
            raise UsageError(
                f"{path} cannot be baked into a checkpoint: {why}; it can still be used here (base_edit={path})"
            )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out} is there already: name a new folder")
    screen = Screen()
    monitor = ConsoleMonitor(screen)
    with monitor.working():
        lm = load_model(_model(paths[-1], model), monitor)
    if lm.is_quantised:
        raise UsageError(
            f"{paths[-1]} cannot be baked into a checkpoint: {lm.name} is quantised, so the edit stands beside its"
            f" matrices; it can still be used here (base_edit={paths[-1]})"
        )
    for path in paths:
        lm.attach(edit_store.load(path, lm))
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        lm.model.save_pretrained(temporary)
        lm.tokenizer.save_pretrained(temporary)
        if out.exists():
            out.rmdir()
        os.replace(temporary, out)
    except OSError as error:
        raise MissingError(f"--out {out} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    facts = many(facts_of(paths), "edited fact")
    screen.note(f"{lm.name} with {facts}, as AutoModelForCausalLM.from_pretrained reads it:")
    screen.line(str(out))
    return 0


def edits_of(directory: Path) -> list[Path]:
    """Edit directories to attach, in order: an edit with what it stands on, or the saved edits of a run whose edits
    stay.
    """
    if (directory / edit_store.MANIFEST).is_file() or not (directory / EDITS).is_dir():
        return edit_store.chain(directory)
    saved = sorted(path for path in (directory / EDITS).iterdir() if not path.name.startswith("."))
    if not saved:
        raise MissingError(f"{directory} holds no saved edit")
    if len(saved) == 1:
        return edit_store.chain(saved[0])
    if read_json(directory / MANIFEST).get("command") != "sequential":
        raise UsageError(
            f"{directory} holds {len(saved):,} edits that were made apart from each other: name one, such as {saved[0]}"
        )
    if not any(path.name.isdigit() for path in saved):
        raise UsageError(
            f"{directory} holds folds (protocol=sme), each a sequence of its own: no model has all of these edits"
        )
    return edit_store.sequence(directory / EDITS)


def facts_of(paths: Sequence[Path]) -> int:
    """How many facts the edits to attach have written; a sum names none, but the steps beside it do."""
    if paths[0].name.startswith(STATE):
        last = int(paths[-1].name.removeprefix(STATE))
        paths = [path for path in paths[0].parent.glob("[0-9]*") if path.name.isdigit() and int(path.name) <= last]
    return sum(len(edit_store.read_manifest(path)["requests"]) for path in paths)


def _model(edit: Path, named: str | None) -> ModelOptions:
    """The model that the edit was made for, as its run loaded it; or the named one."""
    if named is not None and expanded(named).is_dir():
        return ModelOptions(Path(named).name, named)
    made_for: dict[str, Any] = edit_store.read_manifest(edit)["base_model"]
    name = named or made_for["name"]
    for run in (edit.parent.parent, *edit.parents):
        if named is None and (run / MANIFEST).is_file():
            options = read_json(run / MANIFEST).get("config", {}).get("model")
            if options:
                return build(OmegaConf.create({"model": options}).model)
    if name in catalog.names("model"):
        with initialize_config_module("edit_cli.conf", version_base="1.3"):
            return build(compose("evaluate", [f"model={name}"]).model)
    if named is not None:
        raise MissingError(f"--model {named} is neither a folder nor a name in conf/model")
    return ModelOptions(name, made_for["id"], made_for["revision"])
