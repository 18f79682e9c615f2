"""`apply`: bake a weight edit into a plain transformers checkpoint, which needs nothing of ours any more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edit_cli.console import ConsoleMonitor, Screen
from edit_cli.experiment.saved_edits import Base, edited, requests_of, require_new, weight_edits
from edit_cli.files.disk import replacing, require_room
from edit_cli.lm.heads.kinds import auto_class
from edit_cli.wording import many

CANNOT, HOLDER = "cannot be baked into a checkpoint", "a plain checkpoint"
Beside = Callable[[Path, list[Path]], None]


def run(directory: Path, out: Path, base: Base, beside: Beside = lambda folder, paths: None) -> int:
    """Write the edited model and its tokenizer to `out`. beside: writes what else belongs in the folder, given the
    edits.
    """
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
        beside(temporary, paths)
    facts = many(len(requests_of(paths)), "edited fact")
    reader = auto_class(lm.head.kind, lm.model.config, lm.id).__name__
    screen.note(f"{lm.name} with {facts}, as {reader}.from_pretrained reads it:")
    screen.line(str(out))
    return 0
