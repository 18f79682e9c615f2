"""`train-editor`, and how the other commands find what it trained."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from conftest import Killed, json_lines

SMALL = (
    "method.layers=[4]", "method.rank=4", "method.training.edits=2", "method.training.steps=4",
    "method.training.validate_every=2",
    "method.training.validation_edits=4", "method.training.save_every=1", "method.training.log_every=1",
)  # fmt: skip
RUN = Path("runs/train-editor/world/tiny-gpt2/mend")
PLACE = ("dataset=world", "model.device=cpu")


def train(cli, cache, *more: str):
    return cli("train-editor", "method=mend", *PLACE, *SMALL, f"cache_dir={cache}", "limit=20", *more)


@pytest.mark.slow
def test_trained_editors_are_found_and_missing_ones_named(cli, tmp_path):
    """The message of `evaluate` is a command that makes it work."""
    cache = tmp_path / "cache"
    asked = (
        "evaluate",
        "method=mend",
        *PLACE,
        *SMALL,
        f"cache_dir={cache}",
        "limit=2",
        "protocol.observe.generate=false",
    )
    missing = cli(*asked)
    assert missing.code == 3 and "has not been trained for tiny-gpt2" in missing.err
    command = shlex.split(missing.err.split("`")[1])
    assert command[:5] == ["edit-cli", "train-editor", "method=mend", "model=tiny-gpt2", "dataset=world"]
    assert "method.layers=[4]" in command and "method.training.steps=4" in command and f"cache_dir={cache}" in command
    ended = cli(*command[1:], "limit=20", "model.device=cpu")
    assert ended.code == 0, ended.err
    summary = json.loads((RUN / "summary.json").read_text())
    place = Path(summary["checkpoint"])
    assert place.parent == cache / "editors" and sorted(file.name for file in place.iterdir()) == [
        "editor.json",
        "editor.safetensors",
    ]
    about = json.loads((place / "editor.json").read_text())
    assert about["dataset"]["name"] == "world" and about["dataset"]["cases"] == 20 and len(about["base"]) == 64
    assert about["recipe"]["rank"] == 4 and about["recipe"]["training.steps"] == 4
    assert (RUN / "curves.png").read_bytes()[:4] == b"\x89PNG" and "<svg" in (RUN / "curves.svg").read_text()
    lines = json_lines(RUN / "results.jsonl")
    assert [(line["step"], line["kind"]) for line in lines] == [
        (1, "train"), (2, "train"), (2, "validation"), (3, "train"), (4, "train"), (4, "validation")
    ]  # fmt: skip
    lowest = min(line["loss"] for line in lines if line["kind"] == "validation")
    assert summary["best"]["metrics"]["loss"] == pytest.approx(lowest, rel=1e-4)
    found = cli(*asked)
    assert found.code == 0, found.err
    after = json.loads(Path("runs/evaluate/world/tiny-gpt2/mend/summary.json").read_text())["metrics"]
    assert after["es_edit"]["after"]["mean"] > after["es_edit"]["before"]["mean"]
    elsewhere = cli(
        *asked, f"method.checkpoint={place}", "cache_dir=elsewhere", "tag=named", "protocol.observe.sample=false"
    )
    assert elsewhere.code == 0, elsewhere.err
    again = cli(*command[1:], "limit=20", "model.device=cpu")
    assert again.code == 0 and "has been trained already" in again.err
    shown = cli("show", str(RUN))
    assert shown.code == 0 and "mend trained for tiny-gpt2 on world" in shown.words
    assert "mend" in cli("ls", "runs").out


def test_a_killed_training_is_resumed(cli, tmp_path, monkeypatch):
    from edit_cli.runs.run import Run

    whole = train(cli, tmp_path / "first", "run_dir=whole", "method.training.trackers=[]")
    assert whole.code == 0
    real, left = Run.append, [4]

    def append(self, line):
        real(self, line)
        left[0] -= 1
        if not left[0]:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Run, "append", append)
        with pytest.raises(Killed):
            train(cli, tmp_path / "second", "run_dir=broken", "method.training.trackers=[]")
    ended = train(cli, tmp_path / "second", "run_dir=broken", "method.training.trackers=[]")
    assert ended.code == 0 and "training goes on at step 2 of 4" in ended.err
    assert json_lines(tmp_path / "whole/results.jsonl") == json_lines(tmp_path / "broken/results.jsonl")
    tensors = [
        next(tmp_path.glob(f"{cache}/editors/*/editor.safetensors")).read_bytes() for cache in ("first", "second")
    ]
    assert tensors[0] == tensors[1]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("method=ft",), 2, "method=ft learns nothing ahead of time"),
        (("method=mend", "method.checkpoint=x"), 2, "method.checkpoint names a trained editor"),
        (("method=mend", "method.training.step=3"), 2, "did you mean method.training.steps?"),
        (("method=mend", "method.training.schedule=x"), 2, "method.training.schedule=x: choose"),
        (("method=mend", "splits.train=nothing"), 2, "splits.train=nothing"),
    ],
)
def test_wrong_settings_are_told_in_one_line(cli, arguments, code, message):
    ended = cli("train-editor", "dataset=world", *arguments)
    assert ended.code == code and message in ended.err and "Traceback" not in ended.err
