"""`apply`: bake a weight edit into a plain transformers checkpoint, which needs nothing of ours any more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from hydra import compose, initialize_config_module

from edit_cli.commands.parts import load_model
from edit_cli.config import catalog
from edit_cli.config.build import build
from edit_cli.console import ConsoleMonitor, Screen
from edit_cli.edits import store as edit_store
from edit_cli.errors import MissingError, UsageError
from edit_cli.files.disk import replacing, require_place, require_room
from edit_cli.files.paths import expanded
from edit_cli.lm.loading import ModelOptions
from edit_cli.runs.run import EDITS, read_run
from edit_cli.wording import many

WHY_NOT = {
    "module": "it puts a module of its own into the model, which a plain checkpoint cannot hold",
    "route": "it answers in front of the model and changes no weight",
}


def run(
    directory: Path, out: Path, model: str | None, trust_remote_code: bool = False, device_map: str | None = None
) -> int:
    """Write the edited model and its tokenizer to `out`.

    model: its name or folder, if not the one that the edit was made for. trust_remote_code: run code that comes with
    the model. device_map: as `model.device_map`.
    """
    paths = edits_of(directory)
    for path in paths:
        manifest = edit_store.read_manifest(path)
        if manifest["kind"] != "weights":
            _refuse(path, WHY_NOT.get(manifest["kind"], f"its kind is {manifest['kind']}"))
        if manifest["base_model"].get("quantised"):
            _refuse(path, f"{manifest['base_model']['name']} is quantised, so the edit stands beside its matrices")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out} is there already: name a new folder")
    require_place(out, f"--out {out}")
    screen = Screen()
    monitor = ConsoleMonitor(screen)
    options = _model(paths[-1], model, trust_remote_code)
    with monitor.working():
        lm = load_model(replace(options, device_map=device_map), monitor)
    if lm.is_quantised:
        _refuse(paths[-1], f"{lm.name} is quantised, so the edit would stand beside its matrices")
    for path in paths:
        lm.attach(edit_store.load(path, lm))
    require_room(out, sum(part.numel() * part.element_size() for part in lm.model.parameters()), f"--out {out}")
    with replacing(out, f"--out {out}") as temporary:
        lm.model.save_pretrained(temporary)
        lm.tokenizer.save_pretrained(temporary)
    facts = many(facts_of(paths), "edited fact")
    screen.note(f"{lm.name} with {facts}, as AutoModelForCausalLM.from_pretrained reads it:")
    screen.line(str(out))
    return 0


def _refuse(path: Path, why: str) -> NoReturn:
    raise UsageError(f"{path} cannot be baked into a checkpoint: {why}; it can still be used here (base_edit={path})")


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
    if read_run(directory).manifest["command"] != "sequential":
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
    if paths[0].name.startswith(edit_store.STATE):
        last = int(paths[-1].name.removeprefix(edit_store.STATE))
        paths = [path for path in paths[0].parent.glob("[0-9]*") if path.name.isdigit() and int(path.name) <= last]
    return sum(len(edit_store.read_manifest(path)["requests"]) for path in paths)


def _model(edit: Path, named: str | None, trust_remote_code: bool) -> ModelOptions:
    """The model that the edit was made for, or the named one.

    Of what comes with the edit only name, id, revision and dtype are taken, as plain texts: no setting of a model can
    make code be run or be filled from the environment.
    """
    made_for = edit_store.read_manifest(edit)["base_model"]
    dtype = made_for.get("dtype", "float32")
    if named is not None and expanded(named).is_dir():
        return ModelOptions(Path(named).name, named, dtype=dtype, trust_remote_code=trust_remote_code)
    name = named or made_for["name"]
    if name in catalog.names("model"):
        with initialize_config_module("edit_cli.conf", version_base="1.3"):
            packaged: ModelOptions = build(compose("evaluate", [f"model={name}"]).model)
        if named is not None:
            return replace(packaged, dtype=dtype, trust_remote_code=trust_remote_code)
        if packaged.id == made_for["id"]:
            return replace(packaged, revision=made_for["revision"], dtype=dtype, trust_remote_code=trust_remote_code)
    if named is not None:
        raise MissingError(f"--model {named} is neither a folder nor a name in conf/model")
    return ModelOptions(
        name, made_for["id"], revision=made_for["revision"], dtype=dtype, trust_remote_code=trust_remote_code
    )
