"""`apply`: bake a weight edit into a plain transformers checkpoint, which needs nothing of ours any more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from edit_cli.console import ConsoleMonitor, Screen
from edit_cli.edits import store as edit_store
from edit_cli.edits.low_rank import LowRank
from edit_cli.experiment.saved_edits import (
    Base,
    beneath,
    edited,
    methods_of,
    requests_of,
    require_new,
    run_of,
    weight_edits,
)
from edit_cli.files import hub
from edit_cli.files.disk import replacing, require_room
from edit_cli.lm.heads.kinds import auto_class
from edit_cli.report.model_card import Card
from edit_cli.wording import many

CANNOT, HOLDER = "cannot be baked into a checkpoint", "a plain checkpoint"
CARD = "README.md"


def run(directory: Path, out: Path, base: Base) -> int:
    """Write the edited model, its tokenizer and a model card to `out`."""
    paths = weight_edits(directory, CANNOT, HOLDER)
    require_new(out)
    screen = Screen()
    monitor = ConsoleMonitor(screen)
    with monitor.working():
        lm = edited(paths, base, CANNOT, monitor)
    require_room(out, sum(part.numel() * part.element_size() for part in lm.model.parameters()), f"--out {out}")
    with replacing(out, f"--out {out}") as temporary:
        lm.model.save_pretrained(temporary)
        lm.tokenizer.save_pretrained(temporary)
        write_card(screen, temporary, directory, paths)
    facts = many(len(requests_of(paths)), "edited fact")
    reader = auto_class(lm.head.kind, lm.model.config, lm.id).__name__
    screen.note(f"{lm.name} with {facts}, as {reader}.from_pretrained reads it:")
    screen.line(str(out))
    return 0


def write_card(
    screen: Screen,
    folder: Path,
    directory: Path,
    paths: Sequence[Path],
    parts: Mapping[str, LowRank] | None = None,
    file: str = "",
) -> None:
    """The model card of what a folder holds of an edit: facts, method, how well they took where the run of `directory`
    measured just these, how to use and undo it. parts, file: as of `Card`.
    """
    run = run_of(directory)
    made_for = edit_store.read_manifest(paths[0])["base_model"]
    name, revision = hub.known_as(made_for["id"], made_for["revision"])
    card = Card(
        made_for["name"],
        name,
        revision,
        methods_of(paths),
        requests_of(paths),
        (run and run.summary) or {},
        parts,
        file=file,
        beneath=len(requests_of(beneath(paths))),
    )
    (folder / CARD).write_text(str(card), encoding="utf-8")
    if name is None:
        screen.note(
            f"{CARD} calls the base model {made_for['name']}, since it was a folder: where others find it on a hub,"
            " write its id there"
        )
