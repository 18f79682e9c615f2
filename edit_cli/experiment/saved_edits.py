"""What commands that take a saved edit share: which edits a directory means, for which model, and what they wrote."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edit_cli.config import catalog
from edit_cli.config.composed import packaged_option
from edit_cli.editors.base import Editor
from edit_cli.edits import store as edit_store
from edit_cli.errors import MissingError, UsageError
from edit_cli.experiment.setup import load_model
from edit_cli.files import hub
from edit_cli.files.disk import require_place
from edit_cli.files.paths import expanded
from edit_cli.lm.loading import ModelOptions
from edit_cli.lm.model import LM
from edit_cli.monitor import Monitor
from edit_cli.runs.record import EDITS, RunRecord, read_run
from edit_cli.wording import many

WHY_NO_WEIGHTS = {
    "module": "it puts a module of its own into the model, which {} cannot hold",
    "route": "it answers in front of the model and changes no weight",
}


@dataclass(frozen=True)
class Base:
    """Which model an edit is put on, as the command line says.

    model: its name or folder, if not the one that the edit was made for. trust_remote_code: run code that comes with
    the model. device_map: as `model.device_map`.
    """

    model: str | None = None
    trust_remote_code: bool = False
    device_map: str | None = None

    def options(self, edit: Path) -> ModelOptions:
        """The model that the edit was made for, or the named one.

        Of what comes with the edit only name, id, revision, dtype and the bits of a quantized one are taken, as plain
        texts: no setting of a model can make code be run or be filled from the environment.
        """
        made_for = edit_store.read_manifest(edit)["base_model"]
        dtype = made_for.get("dtype", "float32")
        own: dict[str, Any] = {"dtype": dtype, "trust_remote_code": self.trust_remote_code}
        own["device_map"] = self.device_map
        own["quantize"] = made_for.get("quantize")
        if self.model is not None and expanded(self.model).is_dir():
            return ModelOptions(Path(self.model).name, self.model, **own)
        name = self.model or made_for["name"]
        if name in catalog.names("model"):
            packaged: ModelOptions = packaged_option("model", name)
            if self.model is not None:
                return replace(packaged, **own)
            if packaged.id == made_for["id"]:
                return replace(packaged, revision=made_for["revision"], **own)
        if self.model is not None and hub.is_address(self.model):
            return ModelOptions(hub.Address.parse(self.model, "--model ").repo.rpartition("/")[2], self.model, **own)
        if self.model is not None:
            raise MissingError(f"--model {self.model} is neither a folder nor a name in conf/model nor hub:owner/name")
        if Path(made_for["id"]).is_absolute() and not Path(made_for["id"]).is_dir():
            raise MissingError(
                f"{edit} was made for the model in {made_for['id']}, which is there no more: name its folder by --model"
            )
        return ModelOptions(name, made_for["id"], revision=made_for["revision"], **own)

    def load(self, edit: Path, monitor: Monitor) -> LM:
        return load_model(self.options(edit), monitor)


def edits_of(directory: Path) -> list[Path]:
    """Edit directories to attach, in order: an edit with what it stands on, or the saved edits of a run whose edits
    stay, or a folder of such; up to a step of them where that is named.
    """
    if (directory / edit_store.MANIFEST).is_file() or not (directory / EDITS).is_dir():
        steps, which = sequence_of(directory)
        if not steps:
            return edit_store.chain(directory)
        return edit_store.sequence(steps[0].parent, None if which is None else steps[which])
    saved = saved_in(directory)
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


def one_edit(directory: Path) -> Path:
    """The one edit that a directory is, or that a run has saved.

    Raises:
        UsageError: the run has several, or it is one of the steps of a sequence.
    """
    path = directory
    if not (directory / edit_store.MANIFEST).is_file() and (directory / EDITS).is_dir():
        saved = saved_in(directory)
        if len(saved) != 1:
            raise UsageError(f"{directory} holds {many(len(saved), 'saved edit')}: name one of them")
        path = saved[0]
    step = edit_store.read_manifest(path)["method"].get("made", {}).get("step")
    if step or (step == 0 and len(list(path.absolute().parent.glob("[0-9]*"))) > 1):
        raise UsageError(
            f"{path} is one of the steps of a sequence, which stand on each other: it is no edit by itself"
        )
    return path


def attach_base(base: Path, editor: Editor[Any], kind: str) -> None:
    """Put the edit that this one stands on in place; what a method of the same kind remembers of it is taken up."""
    for directory in edit_store.chain(base):
        edit = edit_store.load(directory, editor.lm)
        if edit_store.read_manifest(directory)["method"].get("type") == kind:
            editor.recall(edit)  # before it is attached, as in a sequence
        editor.lm.attach(edit)


def sequence_of(directory: Path) -> tuple[list[Path], int | None]:
    """(all steps of the sequence that a directory is the run, the edits, or one step, of; which of them it is). None of
    them where it is an edit by itself.
    """
    named = (directory / edit_store.MANIFEST).is_file()
    inside = directory / EDITS if (directory / EDITS).is_dir() else directory
    folder = inside if not named else directory.parent if directory.name else directory.absolute().parent
    steps = sorted(path for path in folder.glob("[0-9]*") if path.name.isdigit())
    if not steps or "step" not in edit_store.read_manifest(steps[-1])["method"].get("made", {}):
        return [], None
    if len(steps) == 1 and inside == directory / EDITS:
        return [], None
    names = [path.name for path in steps]
    return steps, names.index(directory.absolute().name) if named else None


def edit_here(place: str | Path, key: str = "") -> Path:
    """The folder of an edit or a run; that of an edit on the hub, once it is fetched (`hub.here`)."""
    names = (edit_store.MANIFEST, edit_store.TENSORS, edit_store.BY_FACT)
    return hub.here(place, names, key)


def saved_in(run: Path) -> list[Path]:
    """What a run has saved, in order."""
    return sorted(path for path in (run / EDITS).iterdir() if not path.name.startswith("."))


def weight_edits(directory: Path, cannot: str, holder: str) -> list[Path]:
    """As `edits_of`, of edits that change weights.

    Raises:
        UsageError: one does not: `cannot`, why a `holder` has no place for it, and what to do instead.
    """
    paths = edits_of(directory)
    for path in paths:
        manifest = edit_store.read_manifest(path)
        kind, model = manifest["kind"], manifest["base_model"]
        if kind != "weights":
            raise refused(path, cannot, WHY_NO_WEIGHTS.get(kind, f"its kind is {kind}").format(holder))
        if model.get("quantized"):
            raise refused(path, cannot, f"{model['name']} is quantized, so the edit stands beside its matrices")
    return paths


def edited(paths: Sequence[Path], base: Base, cannot: str, monitor: Monitor) -> LM:
    """The model with these edits, which change weights, in place.

    Raises:
        UsageError: its weights are quantized: `cannot`, and what to do instead.
    """
    lm = base.load(paths[-1], monitor)
    if lm.is_quantized:
        raise refused(paths[-1], cannot, f"{lm.name} is quantized, so the edit would stand beside its matrices")
    for path in paths:
        lm.attach(edit_store.load(path, lm))
    return lm


def refused(path: Path, cannot: str, why: str) -> UsageError:
    """The refusal of an edit that can only be used here."""
    return UsageError(f"{path} {cannot}: {why}; it can still be used here (base_edit={path})")


def require_new(out: Path, name: str = "--out") -> None:
    """Refuse a folder that is in use (UsageError) or cannot be made (MissingError). name: what names it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{name} {out} is there already: name a new folder")
    require_place(out, f"{name} {out}")


def requests_of(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The facts that the edits to attach have written; a sum names none, but the steps beside it do."""
    if paths and paths[0].name.startswith(edit_store.STATE):
        last = int(paths[-1].name.removeprefix(edit_store.STATE))
        steps = [path for path in paths[0].parent.glob("[0-9]*") if path.name.isdigit() and int(path.name) <= last]
        paths = sorted(steps)
    return [request for path in paths for request in edit_store.read_manifest(path)["requests"]]


def beneath(paths: Sequence[Path]) -> list[Path]:
    """Those of the edits to attach that the last run stood on: it measured its own facts, on top of theirs."""
    return [path for path in paths if path.name == edit_store.BASE]


def methods_of(paths: Sequence[Path]) -> list[str]:
    """Names of the methods that made them, each once."""
    names = [edit_store.read_manifest(path)["method"].get("name") for path in paths]
    return list(dict.fromkeys(name for name in names if name))


def run_of(directory: Path) -> RunRecord | None:
    """The run that measured exactly what `directory` is: itself, or the one that saved this edit and no other."""
    run = directory if (directory / EDITS).is_dir() else directory.absolute().parent.parent
    if run != directory and (directory.absolute().parent.name != EDITS or len(saved_in(run)) != 1):
        return None
    with suppress(MissingError):  # one that is damaged says nothing, and the edit is whole without it
        return read_run(run)
    return None
