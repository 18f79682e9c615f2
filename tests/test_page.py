"""The page of a run: what stands on it, that texts stay texts, and how it behaves in a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fabricated import finished_run, finished_training

HIT, MISS = [True, True, True], [False, False, True]
CASES = {f"case {number}": MISS if number == 7 else HIT for number in range(12)}
EVIL = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">\x1b[31m\u202eabc"


class Tags(HTMLParser):
    """The tags of a page with their attributes, and whatever is read on it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, tag: str) -> list[dict[str, str]]:
        return [
            {key: value or "" for key, value in attributes.items()} for name, attributes in self.tags if name == tag
        ]


def tampered(run: Path, text: str) -> Path:
    """The run with `text` in a record: prompt, answer, reply, sampled text, subject and id."""
    file = run / "results.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[0]["case_id"] = text
    lines[0]["requests"][0] |= {"subject": text, "target_new": text}
    for side in ("before", "after"):
        lines[0][side]["texts"] = [text]
        for probe in lines[0][side]["probes"]:
            probe |= {"prompt": text, "generated": text, "target": text}
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """Of a run with a record that would take over the page if it could."""
    from edit_cli.report.page.run import write_own

    folder = tmp_path_factory.mktemp("pages")
    return write_own(tampered(finished_run(folder / "run", CASES), EVIL))


def test_the_page_tells_results_cases_settings_and_command(page):
    found = Tags(page.read_text(encoding="utf-8"))
    for said in ("memit on m: 12 facts edited", "Edited prompts (efficacy), n = 12", "case 7", "A rewrite prompt",
                 "protocol.observe.max_new_tokens", "How it was made", "Worst and best cases"):  # fmt: skip
        assert said in found.text, said
    assert len(found.of("details")) >= 12
    assert [tag["src"][:26] for tag in found.of("img")] == ["data:image/svg+xml;base64,"]


def test_texts_of_records_are_text(page):
    html = page.read_text(encoding="utf-8")
    found = Tags(html)
    assert len(found.of("script")) == 1 and all("onerror" not in tag for tag in found.of("img"))
    assert "<script>document.title" in found.text and r"\x1b[31m\u202eabc" in found.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", html)


def test_nothing_is_loaded_from_elsewhere(page):
    html = page.read_text(encoding="utf-8")
    found = Tags(html)
    policy = next(tag["content"] for tag in found.of("meta") if tag.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;") and "unsafe" not in policy
    assert not found.of("link") and not re.search(r"(src|href)=\"(?!data:|#)", html)


def test_worst_and_best_are_told_apart(page):
    text = Tags(page.read_text(encoding="utf-8")).text
    worst, best = text.index("Worst\n"), text.index("Best\n")
    assert "case 7" in text[worst:best] and "case 7" not in text[best : text.index("All cases", best)]


@pytest.mark.parametrize("command", ["evaluate", "sequential"])
def test_each_case_stands_there_once_with_its_answers(command, tmp_path):
    from edit_cli.report.page.cases import cases
    from edit_cli.runs.record import read_run

    record = read_run(finished_run(tmp_path / "run", CASES, command=command))
    items = cases(command, record.lines).items
    assert [item.name for item in items] == list(CASES)
    moments = [said.moment for said in items[0].asked[0].said]
    assert moments == (["before", "after"] if command == "evaluate" else ["before", "right after", "at the end"])
    told = [item.status.text for item in items]
    missed = {"case 7"} if command == "evaluate" else {"case 0", "case 7"}  # the first fact is forgotten at the end
    assert {name for name, status in zip(CASES, told, strict=True) if status == "did not take"} == missed


def test_a_fact_that_left_the_sample_is_not_told_as_if_asked_at_the_end(tmp_path):
    """The first is asked with one fact of three in place; the last checkpoint asks of the others."""
    from edit_cli.report.page.cases import cases
    from edit_cli.runs.record import read_run

    run = finished_run(tmp_path / "run", dict(zip("abc", (HIT, HIT, MISS), strict=True)), command="sequential")
    lines = read_run(run).lines
    for line in lines:
        if line["when"] == "checkpoint" and line["case_id"] == "a":
            line["edits"] = 1
    found = {item.name: item for item in cases("sequential", lines).items}
    assert [said.moment for said in found["a"].asked[0].said] == ["before", "right after", "after 1 fact"]
    assert [said.moment for said in found["b"].asked[0].said] == ["before", "right after", "at the end"]
    assert found["a"].rank is None and found["b"].rank is not None and found["c"].rank is not None


def test_a_training_has_a_page_without_cases(cli, tmp_path):
    finished_training(tmp_path / "run", 0.5)
    ended = cli("report", "run", "--out", "t.html")
    assert ended.code == 0 and ended.last == "t.html"
    text = Tags(Path("t.html").read_text()).text
    assert "mend trained for m" in text and "All cases" not in text


ABOUT = {
    "name": "counterfact", "source": "made up", "records_total": 2, "records_dropped": 0, "records_selected": 2,
    "limit": None, "split": None, "ids_sha256": "a" * 64,
}  # fmt: skip
MANIFEST: dict[str, Any] = {
    "method": "memit", "model": "m", "dataset": ABOUT, "seeds": {}, "versions": {}, "protocol": {"facts": 2},
    "config": {"seed": 0, "protocol": {"window": 1, "copies": 3, "proposed_layers": 1, "noise_std": None}},
}  # fmt: skip


def traced(name: str, known: bool) -> dict[str, Any]:
    request = {"prompt": "{} is in", "subject": "Rome", "target_true": "Italy"}
    line = {"case_id": name, "request": request, "known": known, "says": None if known else "Gaul", "error": None}
    numbers = {
        "tokens": ["Rome", " in"], "roles": ["subject_last", "last"], "answer": " Italy", "high": 0.9, "low": 0.1,
        "scores": {"mlp": [[0.8, 0.2], [0.1, 0.3]]}, "noise_std": 0.1,
    }  # fmt: skip
    return {**line, **numbers} if known else line


def test_a_trace_tells_effects_and_facts():
    from edit_cli.report.page.results import found
    from edit_cli.report.trace import trace_summary

    lines = [traced("a", True), traced("b", False)]
    told = found("trace", trace_summary(MANIFEST, lines), lines)
    assert told.lines[0] == "Causal trace of m: 1 fact" and told.tiles[0].more == "of 2"
    assert told.items is not None
    assert [item.status.text for item in told.items.items] == ["traced", "not known"]
    (rows,) = told.items.items[0].grids[0].blocks
    assert [cell.text for cell in rows.cells[0]] == ["Rome", "last subject token", "70.0 (layer 0)"]


def test_a_search_tells_trials_with_their_facts():
    from edit_cli.report import tuning
    from edit_cli.report.page.results import found

    parts = {"efficacy": 100.0, "neighborhood": 50.0}
    trials = [
        {"trial": number, "settings": {"layers": [number]}, "objective": 60.0 + number, "parts": parts, "failed": 0,
         "perplexity": [4.0, 5.0], "seconds": 1.0, "error": None, "penalty": 1.0,
         "metrics": {"efficacy": "efficacy_success", "neighborhood": "neighborhood_success"},
         "facts": {"a": parts, "b": parts}}
        for number in range(2)
    ]  # fmt: skip
    told = found("tune", tuning.summary_of(MANIFEST, trials), trials)
    assert told.items is not None
    assert [item.lead for item in told.items.items] == ["layers=[1]", "layers=[0]"]  # best first
    assert told.tiles[0].value == "61.0 %" and len(told.items.items[0].grids[0].blocks[0].cells) == 2


def test_folds_tell_mistakes_apart_from_what_was_right():
    from fabricated import observation

    from edit_cli.report.page.cases import cases

    turn = {"when": "turn", "fold": 0, "step": 0, "edits": 1, "requests": [], "seconds": None, "error": None}
    right = {**turn, "turn": 0, "case_id": "a", "mistake": False, "before": observation(HIT), "after": None}
    wrong = {**turn, "turn": 1, "case_id": "b", "mistake": True, "before": observation(MISS), "after": observation(HIT)}
    kept = {**turn, "when": "kept", "case_id": "model", "edited": [1], "train": [], "test": []}
    found = cases("sme", [right, wrong, kept]).items
    assert [(item.name, item.status.text) for item in found] == [
        ("fold 0, a", "right already"),
        ("fold 0, b", "took"),
    ]


def test_several_runs_stand_side_by_side(cli, tmp_path):
    for method, hits in (("memit", HIT), ("rome", MISS)):
        finished_run(tmp_path / "runs" / method, {str(n): hits for n in range(4)}, method)
    finished_run(tmp_path / "runs" / "stream", {str(n): HIT for n in range(4)}, "ft", command="sequential")
    ended = cli("report", "runs", "--against", "memit", "--out", "all.html")
    assert ended.code == 0, ended.err
    text = Tags(Path("all.html").read_text()).text
    assert text.index("Comparison") < text.index("Difference from memit over the same cases") < text.index("All cases")
    assert "command sequential" in text  # unlike runs are listed apart
    assert all(f"{method} on m: 4 facts edited" in text for method in ("memit", "rome", "ft"))


def test_an_unfinished_run_has_a_page_of_what_there_is(cli, tmp_path):
    run = finished_run(tmp_path / "run", CASES)
    (run / "summary.json").unlink()
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps({**manifest, "status": "interrupted"}))
    assert cli("report", "run").code == 0
    text = Tags(Path("report.html").read_text()).text
    assert "This run was not finished (interrupted)." in text and "case 7" in text


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["nowhere"], 3, "nowhere holds no run"),
        (["none*"], 3, "none* matches nothing"),
        (["run", "--out", "."], 2, "--out . is a folder"),
        (["run", "--out", "file/p.html"], 3, "--out file/p.html cannot be written"),
    ],
)
def test_what_cannot_be_made_is_told_in_a_line(arguments, code, told, cli, tmp_path):
    finished_run(tmp_path / "run", {"a": HIT})
    (tmp_path / "file").touch()
    ended = cli("report", *arguments)
    assert ended.code == code and told in ended.err and len(ended.err.splitlines()) == 1
    assert not (tmp_path / "report.html").exists()


def test_runs_that_are_called_alike_are_told_apart(cli, tmp_path):
    """In the list of runs by their directories; in the comparison they are one row, over two seeds."""
    for seed, hits in enumerate((HIT, MISS)):
        finished_run(tmp_path / "runs" / f"memit-{seed}", {str(n): hits for n in range(4)}, seed=seed)
    assert cli("report", "runs", "--out", "all.html").code == 0
    text = (tmp_path / "all.html").read_text()
    assert all(f"4 facts edited, one at a time (memit-{seed})</a>" in text for seed in (0, 1))
    assert "seeds</th>" in text
    assert "\N{NO-BREAK SPACE}" in text  # between the ends of an interval
    assert "para- phrase" not in text


def test_the_same_run_gives_the_same_page(tmp_path):
    from edit_cli.report.page.run import write_own

    run = finished_run(tmp_path / "run", {"a": HIT, "b": MISS})
    assert write_own(run).read_bytes() == write_own(run).read_bytes()


# --- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window: the one that $CHROMIUM names, or that is installed."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = (os.environ.get("CHROMIUM"), *map(shutil.which, ("chromium", "chromium-headless-shell", "google-chrome")))
    path = next(filter(None, names), None)
    if path is None:
        pytest.skip("no Chromium is installed ($CHROMIUM names none)")
    with playwright.sync_playwright() as started:
        made = started.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield made
        made.close()


@pytest.fixture
def opened(browser, page) -> Iterator[Any]:
    view = browser.new_page(viewport={"width": 390, "height": 844})
    view.goto(page.as_uri())
    yield view
    view.close()


def shown(view: Any) -> list[str]:
    """Names of the cases that are to be seen, in their order."""
    return view.eval_on_selector_all(".list > .case:not([hidden]) .name", "all => all.map(one => one.textContent)")


def test_search_and_choice_filter_the_cases(opened):
    assert len(shown(opened)) == 12
    opened.fill("input[type=search]", "CASE 11")
    assert shown(opened) == ["case 11"]
    assert opened.text_content("output") == "1 of 12"
    opened.fill("input[type=search]", "")
    opened.select_option("select.status", "did not take")
    assert "case 7" in shown(opened) and "case 3" not in shown(opened)


def test_cases_are_sorted(opened):
    opened.select_option("select.sort", "rank")
    order = shown(opened)
    assert order.index("case 7") < order.index("case 3")
    opened.check("input.turn")
    order = shown(opened)
    assert order.index("case 7") > order.index("case 3")


def test_nothing_overflows_on_a_phone(opened):
    opened.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
    assert opened.evaluate("document.documentElement.scrollWidth") <= 390


def test_no_script_of_a_record_runs(opened):
    opened.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
    assert opened.title() == "memit on m: 12 facts edited, one at a time"
