"""A judge by name: what it is asked, what is kept of it, and what is told when it fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import json_lines
from embedded import embedded_lm
from fake_judge import MODEL, SECRET, Judge

from edit_cli.errors import MissingError, UsageError
from edit_cli.metrics import judge as judges
from edit_cli.metrics.judge import TRIAL, JudgeOptions, Question
from edit_cli.metrics.observe import ObserveOptions, observe
from edit_cli.metrics.scores import probe_values
from edit_cli.monitor import Monitor
from edit_cli.requests import Case, EditRequest, Probe

RIGHT, WRONG = (
    Question("Ada was born in", ("Paris", "Lutetia"), "the Parisian suburbs"),
    Question("He lives in", ("Oslo",), "Rome"),
)


@pytest.fixture
def judge(monkeypatch):
    monkeypatch.setattr(judges, "BACKOFF", 0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Judge().running() as running:
        yield running


@pytest.fixture
def options(judge, tmp_path) -> JudgeOptions:
    return JudgeOptions(model=MODEL, url=judge.url, cache_dir=str(tmp_path / "kept"))


def test_a_reply_is_right_if_the_judge_says_yes(judge, options):
    assert options.verdicts([RIGHT, WRONG, RIGHT], Monitor()) == {RIGHT: True, WRONG: False}
    assert sorted(asked["question"]["reply"] for asked in judge.asked) == ["Rome", "the Parisian suburbs"]  # each once
    (asked,) = [asked for asked in judge.asked if asked["question"]["reply"] == RIGHT.reply]
    assert asked["question"] == {"text": RIGHT.prompt, "wanted": ["Paris", "Lutetia"], "reply": RIGHT.reply}
    assert (asked["model"], asked["temperature"]) == (MODEL, 0.0)


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("Yes", True),
        ("**No**, since Rome is another town.", False),
        ("<think>no… or yes?</think>\nyes", True),
        ("It might.", None),
        ("", None),
        ("Yesterday", None),
    ],
)
def test_what_an_answer_comes_to(judge, options, answer, verdict):
    judge.say = lambda question: answer
    assert options.verdicts([RIGHT], Monitor()) == {RIGHT: verdict}


def test_what_was_answered_is_never_asked_again(judge, options, tmp_path):
    first = options.verdicts([RIGHT], Monitor())
    judge.say = lambda question: "no"  # it has changed its mind since
    assert options.verdicts([RIGHT, WRONG], Monitor()) == first | {WRONG: False}
    assert len(judge.asked) == 2
    other = JudgeOptions(model="wise-2", url=judge.url, cache_dir=str(tmp_path / "kept"))
    assert other.verdicts([RIGHT], Monitor()) == {RIGHT: False}  # another judge is another opinion


def test_a_judge_who_fails_half_way_goes_on_where_it_stopped(judge, options):
    one = JudgeOptions(**{**vars(options), "at_once": 1})
    questions = [Question("p", ("a",), str(number)) for number in range(4)]

    def run_out(question):
        judge.fails.append((400, {"error": "out of credit"}))
        return "no"

    judge.say = run_out
    with pytest.raises(MissingError, match=r"wise-1 at http.* answers 400 Bad Request: .*out of credit.*; what it has"):
        one.verdicts(questions, Monitor())
    done, judge.fails, judge.say = len(judge.asked), [], lambda question: "no"
    assert 0 < done < 4
    assert set(one.verdicts(questions, Monitor()).values()) == {False}
    assert len(judge.asked) == 4


def test_a_busy_endpoint_is_asked_again(judge, options):
    judge.fails = [(429, {}), (503, {})]
    assert options.verdicts([RIGHT], Monitor()) == {RIGHT: True}


@pytest.mark.parametrize(
    ("fails", "told"),
    [
        ([(503, {"error": "tired"})] * 9, "answers 503 Service Unavailable: .*tired"),
        ([(302, {})], "answers 302 Found"),
        ([(200, b"<html>")], "does not answer in JSON"),
        ([(200, {"choices": []})], "another form than OpenAI's"),
        ([(200, {"choices": [{"message": {"content": None}}]})], "answers without a text"),
    ],
)
def test_what_is_wrong_with_an_endpoint_is_one_line(judge, options, fails, told):
    judge.fails = fails
    with pytest.raises(MissingError, match=rf"protocol\.observe\.judge: wise-1 at {judge.url} .*{told}") as caught:
        options.verdicts([RIGHT], Monitor())
    assert "\n" not in str(caught.value)


def test_nobody_there_and_a_damaged_file_are_told(options, tmp_path, monkeypatch):
    monkeypatch.setattr(judges, "BACKOFF", 0)
    nobody = JudgeOptions(model=MODEL, url="http://127.0.0.1:9/v1", cache_dir=str(tmp_path / "other"))
    with pytest.raises(MissingError, match=r"wise-1 at http://127\.0\.0\.1:9/v1 cannot be reached"):
        nobody.try_out()
    (tmp_path / "other" / "answers.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(MissingError, match=r"answers\.sqlite cannot be used .*: delete it"):
        nobody.verdicts([RIGHT], Monitor())


def test_the_key_is_what_the_environment_holds(judge, options, tmp_path, monkeypatch):
    judge.secret = SECRET
    keyed = JudgeOptions(**{**vars(options), "key": "MY_KEY"})
    with pytest.raises(MissingError, match=r"judge\.key=MY_KEY: no environment variable of that name is set"):
        keyed.require()
    monkeypatch.setenv("MY_KEY", "sk-wrong")
    with pytest.raises(MissingError, match="answers 401 Unauthorized: .*Incorrect API key"):
        keyed.try_out()
    monkeypatch.setenv("MY_KEY", SECRET)
    assert keyed.verdicts([TRIAL], Monitor()) == {TRIAL: True}
    assert SECRET.encode() not in (tmp_path / "kept" / "answers.sqlite").read_bytes()


def test_settings_that_name_half_a_judge_are_refused():
    with pytest.raises(UsageError, match=r"judge\.model has no value"):
        JudgeOptions(url="http://localhost/v1")
    for url in (None, "localhost:8000", "file:///etc/passwd"):
        with pytest.raises(UsageError, match=r"judge\.url=.*give the address of an OpenAI-compatible API"):
            JudgeOptions(model=MODEL, url=url)


def test_verdicts_stand_beside_what_was_written_and_count(options):
    lm = embedded_lm()
    prompt = "Jormia Stenenen plays the"
    said = lm.generate([prompt], 3)[0].split()[0]
    asked = (
        Probe("rewrite", prompt, f" {said}"),
        Probe("paraphrase", prompt, " xylophone"),
        Probe("neighborhood", prompt, " xylophone", aliases=(f" {said}",)),
    )
    case = Case("1", (EditRequest("{} plays the", "Jormia Stenenen", said),), asked)
    (seen,) = observe(lm, [case], ObserveOptions(sample=False, max_new_tokens=3, top_tokens=0, judge=options))
    assert [probe["judged"] for probe in seen["probes"]] == [True, False, True]
    values = probe_values({"before": seen, "after": seen}, "after")
    found = {name: value for name, value in values.items() if name.endswith("_judged")}
    assert found == {
        "efficacy_generated_judged": 100.0,
        "paraphrase_generated_judged": 0.0,
        "neighborhood_generated_judged": 100.0,
    }
    (silent,) = observe(lm, [case], ObserveOptions(sample=False, max_new_tokens=3, top_tokens=0))
    assert "judged" not in silent["probes"][0]


def test_a_run_has_the_judges_numbers_beside_the_others(cli, judge, monkeypatch, tmp_path):
    judge.secret = SECRET
    monkeypatch.setenv("MY_KEY", SECRET)
    place = "protocol.observe.judge"
    words = ("evaluate", "method=none", "limit=2", f"{place}.model={MODEL}", f"{place}.url={judge.url}", "run_dir=r")
    ended = cli(*words, f"{place}.key=MY_KEY", f"{place}.cache_dir={tmp_path / 'kept'}", quick=True)
    assert ended.code == 0, ended.err
    metrics = json.loads(Path("r/summary.json").read_text())["metrics"]
    judged = [probe["judged"] for line in json_lines(Path("r/results.jsonl")) for probe in line["after"]["probes"]]
    assert judged and all(type(one) is bool for one in judged)
    assert metrics["neighborhood_generated_judged"]["after"]["mean"] == 100.0  # the embedded model knows its world
    assert "judged, % ↑" in ended.out and SECRET not in Path("r/manifest.json").read_text()
    Path("mine/protocol").mkdir(parents=True)
    Path("mine/method").mkdir()
    Path("mine/method/told.yaml").write_text(
        "# @package _global_\nprotocol:\n  observe:\n    judge: {model: m, url: 'http://x/v1', key: HOME}\n"
    )
    refused = cli("evaluate", "--config-dir", "mine", "+method@_global_=told", "limit=2")
    assert refused.code == 2 and "names an environment variable, which no file may" in refused.err
