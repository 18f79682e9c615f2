"""Full disks, folders that cannot be written to, crashes in the middle: one line, and nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import exact
from safetensors import SafetensorError

from edit_cli.edits import store as edit_store
from edit_cli.errors import MissingError
from edit_cli.files import disk
from edit_cli.files.disk import replacing, require_folder, require_place, require_room
from edit_cli.files.json_files import read_json, write_json
from edit_cli.files.tensors import write_tensors

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
FT = ("method=ft", "method.steps=2", "protocol.observe.generate=false")


def fails(error: Exception):
    def act(*_, **__):
        raise error

    return act


def one_line(ended, *told: str) -> None:
    assert ended.code == 3, ended.err
    (line,) = [line for line in ended.err.strip().splitlines() if line.startswith("error: ")]
    assert "Traceback" not in ended.err and all(part in line for part in told), line


# --- the means
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, str]]:
    """What has been brought to the disk, and what has been renamed, in order."""
    made: list[tuple[str, str]] = []
    sync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        made.append(("synced", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        sync(handle)

    def replaced(source, target) -> None:
        made.append(("renamed", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    return made


def test_everything_is_on_the_disk_before_it_takes_its_place(tmp_path, calls):
    with replacing(tmp_path / "edit") as folder:
        write_tensors(folder / "edit.safetensors", {"a": torch.ones(2)})
        write_json(folder / "edit.json", {"id": 1})
        (folder / "base").mkdir()
        (folder / "base" / "copied").write_text("x")
    # numbers, then what speaks of them
    assert calls.index(("synced", "edit.safetensors")) < calls.index(("renamed", "edit.json"))
    placed = calls.index(("renamed", "edit"))
    assert {("synced", "copied"), ("synced", "base"), ("synced", "edit.json")} <= set(calls[:placed])
    assert calls[-1] == ("synced", tmp_path.name)  # and the name itself
    assert [path.name for path in tmp_path.iterdir()] == ["edit"]


def test_a_folder_that_cannot_be_filled_leaves_the_former_one(tmp_path):
    with replacing(tmp_path / "a") as folder:
        (folder / "x").write_text("first")
    for error in (FULL, SafetensorError("Error while serializing: No space left on device (os error 28)")):
        with pytest.raises(MissingError, match="a cannot be written: .*make room"), replacing(tmp_path / "a"):
            raise error
    with replacing(tmp_path / "a") as folder:
        (folder / "y").write_text("second")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and [p.name for p in (tmp_path / "a").iterdir()] == ["y"]


def test_a_link_goes_on_pointing_where_it_points(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to("target")
    with replacing(tmp_path / "link") as folder:
        (folder / "x").write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target" / "x").read_text() == "new"


def test_what_a_killed_process_left_is_removed_after_a_while(tmp_path):
    gone, fresh, mine = (tmp_path / f".a.{number}" for number in (2**22 + 1, 2**22 + 2, os.getppid()))
    for path in (gone, fresh, mine):
        path.mkdir()
    for path in (gone, mine):
        os.utime(path, (0, 0))
    with replacing(tmp_path / "a") as folder:
        (folder / "x").write_text("new")
    assert not gone.exists() and fresh.exists() and mine.exists()


def test_a_file_that_cannot_be_written_leaves_the_former_one(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"a": 1})
    monkeypatch.setattr(os, "fsync", fails(FULL))
    with pytest.raises(MissingError, match=r"a\.json cannot be written: No space left on device; make room"):
        write_json(tmp_path / "a.json", {"a": 2})
    assert read_json(tmp_path / "a.json") == {"a": 1} and [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_places_are_tried_before_they_are_needed(tmp_path, monkeypatch):
    require_folder(tmp_path / "a" / "b", "key")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    require_place(tmp_path / "c" / "d", "key")
    require_room(tmp_path / "c" / "d", 1000, "key")
    assert not (tmp_path / "c").exists()
    (tmp_path / "file").write_text("")
    for ask in (require_folder, require_place):
        with pytest.raises(MissingError, match="^key=x cannot be written: "):
            ask(tmp_path / "file" / "b" / "c", "key=x")
    with pytest.raises(MissingError, match=r"key cannot be written: it takes [\d,.]+ GB, and .* are free; make room"):
        require_room(tmp_path / "c", 10**18, "key")
    monkeypatch.setattr(disk.tempfile, "TemporaryFile", fails(PermissionError(errno.EACCES, "Permission denied")))
    with pytest.raises(MissingError, match="key cannot be written: Permission denied"):
        require_folder(tmp_path, "key")


# --- the commands
# ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def edited(cli) -> Path:
    assert (
        cli("edit", *FT, "edit.prompt={} is", "edit.subject=Ada", "edit.target=old", "run_dir=e", quick=True).code == 0
    )
    return Path("e")


def test_apply_on_a_full_disk(cli, edited, monkeypatch):
    from transformers import PreTrainedModel

    with monkeypatch.context() as patch:
        full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        patch.setattr(PreTrainedModel, "save_pretrained", fails(full))
        one_line(cli("apply", "e", "--out", "new/baked"), "--out new/baked cannot be written", "make room")
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(".")
        patch.setattr(disk.shutil, "disk_usage", lambda _: usage._replace(free=1000))
        one_line(cli("apply", "e", "--out", "baked"), "--out baked cannot be written: it takes", "0.0 are free")
    assert not Path("baked").exists() and not any(Path("new").glob("*")) and not list(Path().glob(".baked*"))
    with monkeypatch.context() as patch:
        patch.setattr("edit_cli.experiment.saved_edits.load_model", lambda *_: pytest.fail("it was loaded first"))
        one_line(cli("apply", "e", "--out", "e/manifest.json/baked"), "--out e/manifest.json/baked cannot be written")


def test_compare_where_nothing_can_be_written(cli, monkeypatch):
    assert cli("evaluate", *FT, "limit=2", "run_dir=r", quick=True).code == 0
    Path("file").write_text("")
    one_line(cli("compare", "r", "--out", "file/x/y"), "--out file/x/y cannot be written")
    monkeypatch.setattr("edit_cli.report.compare.csv_text", fails(FULL))
    one_line(cli("compare", "r", "--out", "c"), "--out c cannot be written: No space left on device; make room")


def test_a_disk_that_fills_up_during_a_run(cli, monkeypatch):
    """Whatever is being written: what is finished is kept, and the same command goes on."""
    command = ("sequential", *FT, "limit=2", "protocol.batch_size=1", "protocol.holdout=0", "run_dir=r", "figures=true")
    with monkeypatch.context() as patch:
        full = fails(OSError(errno.ENOSPC, FULL.strerror, "r/x.png"))
        patch.setattr("edit_cli.report.figures.style.write", full)
        one_line(cli(*command, quick=True), "r/x.png cannot be used: No space left on device; make room", "goes on")
    with monkeypatch.context() as patch:
        patch.setattr("edit_cli.runs.run.write_json", fails(MissingError("r/summary.json cannot be written: x")))
        one_line(cli(*command, quick=True), "r/summary.json cannot be written")
    assert cli(*command, quick=True).code == 0


def test_a_disk_that_takes_no_log(cli, monkeypatch):
    """The log cannot say what has happened, but the screen does."""
    import edit_cli.runs.run as results

    real = open

    def opened(path, mode="r", *args, **kwargs):
        if str(path).endswith("log.txt"):
            raise FULL
        return real(path, mode, *args, **kwargs)

    monkeypatch.setattr(results, "open", opened, raising=False)
    ended = cli("evaluate", *FT, "limit=1", "method.layers=[17]", "run_dir=r", quick=True)
    assert ended.code == 2 and "layer 17" in ended.err


def test_a_training_knows_beforehand_where_its_editor_goes(cli, monkeypatch):
    Path("file").write_text("")
    monkeypatch.setattr("edit_cli.experiment.base.load_model", lambda *_: pytest.fail("it was trained first"))
    ended = cli("train-editor", "method=mend", "dataset=world", "limit=30", "cache_dir=file", "run_dir=r")
    one_line(ended, "cache_dir=file cannot be written")
    assert not Path("r").exists()


@pytest.mark.parametrize(
    "address", ["hub:a/b:../../etc/passwd", "hub:a/b:x/../../../y", "hub:a/b@../../x:f.json", "hub:a/..:f.json",
                "hub:a/b:/etc/passwd", r"hub:a/b:..\..\x"],
)  # fmt: skip
def test_addresses_that_lead_out_of_their_repository(cli, address):
    ended = cli("evaluate", *FT, "dataset=facts", f"dataset.path='{address}'", "run_dir=r", quick=True)
    assert ended.code == 2 and "leads out of the repository" in ended.err
    assert len(ended.err.strip().splitlines()) == 1


# --- sequences
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["lifelong", "sme"])
def test_a_damaged_step_names_what_to_delete_and_is_made_again(cli, kill_after, protocol):
    from conftest import Killed

    own = {
        "lifelong": ("protocol.batch_size=1", "protocol.holdout=0", "limit=3"),
        "sme": ("protocol=sme", "protocol.folds=1", "protocol.train=1", "protocol.test=1", "limit=3"),
    }[protocol]
    command = ("sequential", *FT, *own)
    assert cli(*command, "run_dir=whole", quick=True).code == 0
    kill_after(6 if protocol == "lifelong" else 3)
    with pytest.raises(Killed):
        cli(*command, "run_dir=r", quick=True)
    step = sorted(Path("r/edits").iterdir())[0]
    tensors = step / edit_store.TENSORS
    tensors.write_bytes(tensors.read_bytes()[:-3])
    ended = cli(*command, "run_dir=r", quick=True)
    one_line(ended, f"{tensors} cannot be read", f"delete {step}, and the same command makes that")
    shutil.rmtree(step)
    assert cli(*command, "run_dir=r", quick=True).code == 0
    assert exact(Path("r")) == exact(Path("whole"))


@pytest.mark.slow
def test_a_damaged_sum_names_all_steps(cli):
    command = ("sequential", *FT, "limit=4", "protocol.batch_size=1", "protocol.holdout=0", "protocol.edits_room=1")
    assert cli(*command, "run_dir=r", quick=True).code == 0
    whole = exact(Path("r"))
    (state,) = Path("r/edits").glob("state-*")
    (state / edit_store.TENSORS).write_bytes(b"")
    Path("r/summary.json").unlink()
    lines = Path("r/results.jsonl").read_text().splitlines(keepends=True)
    Path("r/results.jsonl").write_text("".join(lines[:-1]))
    one_line(cli(*command, "run_dir=r", quick=True), f"{state}", "delete r/edits, and the same command makes all steps")
    shutil.rmtree("r/edits")
    assert cli(*command, "run_dir=r", quick=True).code == 0
    assert exact(Path("r")) == whole
    assert json.loads(Path("r/manifest.json").read_text())["status"] == "success"
