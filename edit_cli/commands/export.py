"""`export`: a weight edit in a form that other programs load, as an adapter beside the model or as a checkpoint."""

from __future__ import annotations

from pathlib import Path

from edit_cli.commands import apply
from edit_cli.console import ConsoleMonitor, Screen
from edit_cli.edits import gguf_adapter, peft_adapter
from edit_cli.edits import store as edit_store
from edit_cli.edits.low_rank import added, low_rank
from edit_cli.errors import UsageError
from edit_cli.experiment.saved_edits import Base, edited, requests_of, require_new, weight_edits
from edit_cli.files.disk import replacing, require_room
from edit_cli.report.tables.saved import adapter_table
from edit_cli.wording import many

FORMATS = ("peft", "gguf-lora", "checkpoint")
READERS = {"peft": "PeftModel.from_pretrained", "gguf-lora": f"--lora {gguf_adapter.FILE} of llama.cpp"}
CANNOT, HOLDER = "cannot be exported as an adapter", "an adapter"


def run(directory: Path, to: str, out: Path, base: Base, rank: int | None = None, arch: str | None = None) -> int:
    """Write the edit to `out`, with a model card. rank: the most that an adapter may have in each matrix. arch: what
    GGUF calls the kind of model.
    """
    if to not in FORMATS:
        raise UsageError(f"--to {to}: choose {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    if arch is not None and to != "gguf-lora":
        raise UsageError(f"--arch {arch} is of --to gguf-lora")
    if to == "checkpoint":
        if rank is not None:
            raise UsageError("--rank is of adapters (--to peft, gguf-lora): a checkpoint holds whole matrices")
        return apply.run(directory, out, base)
    if to == "gguf-lora":
        gguf_adapter.library()
    return _adapter(directory, to, out, base, rank, arch)


def _adapter(directory: Path, to: str, out: Path, base: Base, rank: int | None, arch: str | None) -> int:
    paths = weight_edits(directory, CANNOT, HOLDER)
    require_new(out)
    screen = Screen()
    monitor = ConsoleMonitor(screen)
    with monitor.working():
        lm = edited(paths, base, CANNOT, monitor)
        with monitor.phase("factors"):
            try:
                updates = added(lm)
            except UsageError as error:
                raise UsageError(
                    f"{directory} {CANNOT}: {error}; a checkpoint can hold it (edit-cli export {directory} --to"
                    " checkpoint)"
                ) from None
            parts = {module: low_rank(update, rank) for module, update in sorted(updates.items())}
    made_for = edit_store.read_manifest(paths[0])["base_model"]
    factors = {module: part.factors for module, part in parts.items()}
    require_room(out, 4 * sum(f.left.numel() + f.right.numel() for f in factors.values()), f"--out {out}")
    with replacing(out, f"--out {out}") as temporary:
        if to == "peft":
            peft_adapter.write(temporary, lm, factors, made_for["id"], made_for["revision"])
        else:
            gguf_adapter.write(temporary, lm, factors, arch)
        apply.write_card(screen, temporary, directory, paths, parts, "" if to == "peft" else gguf_adapter.FILE)
    screen.show(adapter_table(parts))
    screen.note(f"{many(len(requests_of(paths)), 'edited fact')} beside {lm.name}, as {READERS[to]} reads it:")
    screen.line(str(out))
    return 0
