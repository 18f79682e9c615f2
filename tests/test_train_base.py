"""Base models for methods that edit mistakes: trained on a data set's own answers, saved as any other model."""

from __future__ import annotations

import json

import pytest

import edit_cli
from edit_cli.config.composed import packaged_option
from tools.train_base import main

CLAIMS = ["dataset=world_claims", "dataset.split=train"]


def test_a_classifier_learns_the_labels_of_its_claims(tmp_path, capsys):
    """The embedded one knows them; of these it is told the opposite."""
    cases = packaged_option("dataset", "world_claims").load(10).cases
    rows = [
        {"id": n, "claim": case.requests[0].text, "label": case.requests[0].target_new} for n, case in enumerate(cases)
    ]
    (tmp_path / "claims.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    out, sizes = tmp_path / "claims", ["--held_out", "2", "--epochs", "10", "--batch", "8", "--lr", "1e-3"]
    data = ["dataset=fever", f"dataset.path={tmp_path / 'claims.jsonl'}"]
    assert main(["tiny-bert", "--out", str(out), *sizes, *data]) == 0
    learned, held_out = capsys.readouterr().out.splitlines()[-2:]
    assert learned == "learned: 100.0% right of 8" and held_out.endswith("right of 2")
    lm = edit_cli.load(str(out))
    assert lm.head.kind == "classifier" and sorted(getattr(lm.head, "labels", [])) == ["REFUTES", "SUPPORTS"]
    assert lm.generate([row["claim"] for row in rows[:8]], 1) == [row["label"] for row in rows[:8]]


@pytest.mark.slow
def test_an_encoder_decoder_learns_to_answer(tmp_path, capsys):
    """Other answers than those that the embedded one knows."""
    cases = packaged_option("dataset", "world_qa").load(6).cases
    rows = [{"question": case.requests[0].text, "answer": case.requests[0].target_new} for case in cases]
    (tmp_path / "questions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    sizes = ["--held_out", "1", "--epochs", "20", "--batch", "8", "--lr", "1e-3"]
    data = ["dataset=questions", f"dataset.path={tmp_path / 'questions.jsonl'}"]
    assert main(["tiny-bart", "--out", str(tmp_path / "out"), *sizes, *data]) == 0
    assert "learned: 100.0% right of 5" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_model(tmp_path):
    sizes = ["--limit", "4", "--held_out", "1", "--epochs", "1"]
    found = []
    for name in ("one", "other"):
        assert main(["tiny-bert", "--scratch", "--out", str(tmp_path / name), *sizes, *CLAIMS]) == 0
        found.append((tmp_path / name / "model.safetensors").read_bytes())
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tiny-bert", "world_claims"], "'world_claims' is no setting"),
        (["tiny-bert", *CLAIMS, "--limit", "3", "--held_out", "100000"], "none is left to learn"),
        (["tiny-gpt2", "dataset=world_qa"], "tiny-gpt2 is no encoder-decoder"),
        (["no/folder/here", *CLAIMS, "--limit", "3"], "MODEL=no/folder/here: no such folder"),
        (["tiny-bert", *CLAIMS, "--epochs", "0"], "--epochs must be at least 1"),
        (["tiny-bert", "dataset=convsent", "dataset.path=none.json"], "none.json"),
        (["tiny-bert", "dataset=nothing"], "nothing"),
    ],
)
def test_wrong_arguments_are_told_in_a_line(tmp_path, capsys, arguments, said):
    assert main([*arguments, "--out", str(tmp_path / "out")]) in (2, 3)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line


def test_a_folder_that_is_there_is_left_alone(tmp_path, capsys):
    assert main(["tiny-bert", *CLAIMS, "--out", str(tmp_path)]) == 2
    assert "is there already" in capsys.readouterr().err
