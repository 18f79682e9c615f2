"""`prepare`: answers that a model might have given, and other wordings, for questions and claims of anybody's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import edit_cli
from edit_cli.config.composed import model_called, packaged_option
from edit_cli.errors import UsageError
from edit_cli.experiment.records import _identity
from edit_cli.lm.heads.beams import distinct

RECORDS = 6


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def questions(tmp_path) -> Path:
    """Questions that the embedded T5 can answer."""
    cases = packaged_option("dataset", "world_qa").load(RECORDS).cases
    file = tmp_path / "questions.jsonl"
    rows = [
        {"question": case.requests[0].text, "answers": [case.right_or(case.requests[0].target_true)]} for case in cases
    ]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


@pytest.mark.parametrize("model", ["tiny-t5", "tiny-gpt2"])
def test_alternatives_are_the_likeliest_answers(model):
    """Of an encoder-decoder the first scores best, and greedy search finds none of its own; causal: as plain beams."""
    lm = edit_cli.load(model)
    prompts = [case.requests[0].text for case in packaged_option("dataset", "world_qa").load(3).cases]
    for prompt, beams in zip(prompts, lm.alternatives(prompts, 4, 6), strict=True):
        assert len(beams) == len(set(beams)) > 1
        if model == "tiny-t5":  # whose answers end by themselves, so that the texts are whole beams
            scores = [sum(seen.nll for seen in lm.loglikelihood([(prompt, beam)])) for beam in beams]
            assert scores[0] == min(scores)
            assert lm.generate([prompt], 6)[0] in beams
        else:
            ids = torch.tensor([lm.head.encode([(prompt, None)], new=6)[0].ids])
            plain = lm.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, num_beams=4,
                                      num_return_sequences=4, do_sample=False)  # fmt: skip
            texts = lm.tokenizer.batch_decode(plain[:, ids.shape[1] :], skip_special_tokens=True)
            assert beams == distinct(text.split("\n")[0] for text in texts)


def test_replies_by_beams_are_the_first_of_them():
    """KE's authors ask by five. The translator is put to texts of no language that it knows: greedy search errs."""
    lm, by_beams = edit_cli.load("tiny-translator"), edit_cli.load("tiny-translator", beams=4)
    prompts = [f"Who wrote {name}?" for name in ("Olm", "the Brentish Sagas", "Kaltoren", "Ustimar and Vey", "Pellow")]
    replies = by_beams.generate(prompts, 12)
    assert replies == [beams[0] for beams in lm.alternatives(prompts, 4, 12)]
    assert replies != lm.generate(prompts, 12)
    with pytest.raises(UsageError, match="model.beams=4: only replies of encoder-decoder"):
        edit_cli.load("tiny-gpt2", beams=4)


def test_a_classifiers_alternatives_are_its_labels_likeliest_first():
    lm = edit_cli.load("tiny-bert")
    claims = [case.requests[0].text for case in packaged_option("dataset", "world_claims").load(4).cases]
    assert [labels[0] for labels in lm.alternatives(claims, 2, 1)] == lm.generate(claims, 1)
    assert {frozenset(labels) for labels in lm.alternatives(claims, 2, 1)} == {frozenset(("SUPPORTS", "REFUTES"))}


def test_questions_become_records_that_can_be_edited(cli, questions):
    ended = cli(
        "prepare", f"dataset.path={questions}", "out=records.jsonl", 'templates=["Say: {}","{}"]', "alternatives=4"
    )
    assert ended.code == 0 and "edit them: dataset=zsre_qa dataset.path=" in ended.last
    records = written(Path("records.jsonl"))
    assert [record["input"] for record in records] == [row["question"] for row in written(questions)]
    for record in records:
        right = record["output"][0]["answer"]
        assert record["prediction"] == right  # the world is known by heart
        assert len(record["alternatives"]) == 3 and right not in record["alternatives"]
        assert record["rephrases"] == [f"Say: {record['input']}"]  # the question itself is no other wording
    lm = edit_cli.load("tiny-t5")
    for record in records:
        said, again = lm.generate([record["input"], record["rephrases"][0]], 20)
        assert record["filtered_rephrases"] == (record["rephrases"] if said == again else [])
    assert any(record["filtered_rephrases"] for record in records)
    run = cli("evaluate", "method=lookup", "model=tiny-t5", "dataset=zsre_qa", "dataset.path=records.jsonl",
              "dataset.unrelated=zsre", "run_dir=run")  # fmt: skip
    assert run.code == 0
    lines = written(Path("run/results.jsonl"))
    assert len(lines) == RECORDS
    by_id = {record["id"]: record for record in records}
    assert all(line["requests"][0]["target_new"] in by_id[line["case_id"]]["alternatives"] for line in lines)


def test_claims_become_records_whose_label_can_be_flipped(cli, tmp_path):
    cases = packaged_option("dataset", "world_claims").load(4).cases
    rows = [
        {"id": n, "claim": case.requests[0].text, "label": case.requests[0].target_true} for n, case in enumerate(cases)
    ]
    rows[0]["label"] = cases[0].requests[0].target_new  # so that the model errs
    Path("claims.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    words = ["prepare", "model=tiny-bert", "dataset=fever", "dataset.path=claims.jsonl", "out=records.jsonl"]
    ended = cli(*words, 'templates=["It is true that {}"]')
    assert ended.code == 0 and "dataset=fever" in ended.last
    records = written(Path("records.jsonl"))
    assert [record["id"] for record in records] == ["0", "1", "2", "3"]  # mistakes, too
    assert all({record["prediction"], *record["alternatives"]} == {"SUPPORTS", "REFUTES"} for record in records)
    assert records[0]["alternatives"] == [records[0]["output"][0]["answer"]] == [rows[0]["label"]]
    assert cli("evaluate", "method=lookup", "model=tiny-bert", "dataset=fever", "dataset.path=records.jsonl").code == 0


def test_other_wordings_come_back_from_another_language(cli, questions):
    """The invented translator does for both ways: what comes back is what two passes of it give."""
    names = ["there=tiny-translator", "back=tiny-translator", "wordings=2"]
    assert cli("prepare", f"dataset.path={questions}", "out=r.jsonl", "limit=1", *names).code == 0
    lm = edit_cli.load("tiny-translator")
    (record,) = written(Path("r.jsonl"))
    tokens = 2 * len(lm.tokenizer(record["input"])["input_ids"])
    (abroad,) = lm.alternatives([record["input"]], 2, tokens)
    assert record["rephrases"] == distinct(text for some in lm.alternatives(abroad, 2, tokens) for text in some)


def test_a_killed_command_goes_on_with_the_same_bytes(cli, questions, monkeypatch):
    words = ["prepare", f"dataset.path={questions}", 'templates=["Say: {}"]']
    monkeypatch.setattr("edit_cli.commands.prepare.WINDOW", 2)
    assert cli(*words, "out=whole.jsonl").code == 0
    from edit_cli.commands.prepare import Maker

    made, asked = Maker.records, []

    def dying(self: Maker, cases: Any) -> Any:
        asked.append([case.id for case in cases])
        if len(asked) == 2:
            raise KeyboardInterrupt
        return made(self, cases)

    monkeypatch.setattr(Maker, "records", dying)
    cli(*words, "out=cut.jsonl")
    with Path(".cut.jsonl.part").open("a") as part:
        part.write('{"id": "torn')
    ended = cli(*words, "out=cut.jsonl")
    assert ended.code == 0 and "continuing: 2 of 6 records" in ended.err
    assert asked == [["0", "1"], ["2", "3"], ["2", "3"], ["4", "5"]]
    assert Path("cut.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    assert not Path(".cut.jsonl.part").exists()


@pytest.mark.parametrize(
    ("line", "more"),
    [
        ('{"id": "0", "input": "x", "meta": {}, "alternatives": ["y"]}', ()),  # by other settings
        ('{"something": "else"}', ()),
        ("no JSON", ("overwrite=true",)),
    ],
)
def test_what_is_none_of_its_own_is_not_taken_up(cli, questions, line, more):
    Path(".r.jsonl.part").write_text(f"{line}\n{line}\n")
    ended = cli("prepare", f"dataset.path={questions}", "out=r.jsonl", 'templates=["Say: {}"]', "limit=2", *more)
    assert ended.code == 0 and "continuing" not in ended.err
    assert [record["id"] for record in written(Path("r.jsonl"))] == ["0", "1"]
    assert [path.name for path in Path().glob(".r.jsonl*")] == []


def test_a_file_that_was_damaged_is_told(cli, questions):
    Path(".r.jsonl.part").write_text("no JSON\n{}\n")
    ended = cli("prepare", f"dataset.path={questions}", "out=r.jsonl", "limit=2")
    assert ended.code == 3 and ".r.jsonl.part, line 1, is damaged" in ended.error and "overwrite=true" in ended.error


def test_what_is_known_by_beams_is_kept_apart():
    """From what is known by greedy replies, in the cache."""
    assert _identity(model_called("tiny-t5", {"beams": 4})) != _identity(model_called("tiny-t5", {}))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "out has no value"),
        (["out=q.jsonl"], "out=q.jsonl: is there already"),
        (["out=no/folder/r.jsonl"], "out=no/folder/r.jsonl"),
        (["out=r.jsonl", "templates=[no slot]"], "give one slot {}"),
        (["out=r.jsonl", "there=tiny-translator"], "there and back"),
        (["out=r.jsonl", "there=tiny-gpt2", "back=tiny-translator"], "there=tiny-gpt2 is a causal language model"),
        (["out=r.jsonl", "alternatives=1"], "alternatives"),
        (["out=r.jsonl", "model=tiny-bert"], "tiny-bert"),
        (["out=r.jsonl", "dataset.path=none.jsonl"], "none.jsonl"),
        (["out=r.jsonl", "report=true"], "keeps no run"),
        (["out=r.jsonl", "processes=2"], "processes: `prepare` writes one file"),
    ],
)
def test_wrong_input_is_told_in_a_line(cli, words, said):
    Path("q.jsonl").write_text('{"question": "Where is Oslo?", "answer": "Norway"}\n')
    given = [] if any(word.startswith("dataset.path") for word in words) else ["dataset.path=q.jsonl"]
    ended = cli("prepare", *given, *words)
    assert ended.code in (2, 3) and said in ended.error
    assert not Path("r.jsonl").exists()


MALFORMED = {
    '{"answers": ["Oslo"]}': "question is missing",
    '{"question": "", "answer": "Oslo"}': "question is empty",
    '{"question": 3, "answer": "Oslo"}': "question is not text",
    '{"question": "Where?"}': "answers is missing",
    '{"question": "Where?", "answers": []}': "answers holds no answer",
    '{"question": "Where?", "answers": [" "]}': "answers[0] is empty",
    '{"question": "Where?", "answers": [["Oslo"]]}': "answers[0] is not text",
    '{"question": "Where?", "output": [{"provenance": 1}]}': "output holds no answer",
    '{"question": "Where?", "answer": "Oslo", "subject": "Bergen"}': "subject does not occur in the question",
    '{"question": "Where?", "answer": "Oslo", "rephrases": "Whither?"}': "rephrases is not a list",
    '{"question": "Where?", "answer": "Oslo", "rephrases": [4]}': "rephrases[0] is not text",
}


def test_malformed_records_are_named_by_line_and_field(cli):
    lines = ['{"question": "Where is Oslo?", "answer": "Norway"}', *MALFORMED]
    Path("q.jsonl").write_text("\n".join(lines))
    ended = cli("prepare", "dataset.path=q.jsonl", "out=r.jsonl")
    heard = " ".join(ended.err.split())
    assert f"dropped {len(MALFORMED)} of {len(lines)} records" in heard
    for number, what in enumerate(MALFORMED.values(), 2):
        if number < 12:
            assert f"line {number}: {what}" in heard
