"""`compare`: against a reference, over seeds, only of like with like, beside published numbers, in several formats."""

from __future__ import annotations

import csv
import io
import json
import re
import statistics

import numpy as np
import pytest
from fabricated import finished_run, finished_training
from scipy import stats

GOOD, BAD = (True, True, True), (False, True, True)


def cases(hits: int, count: int = 12) -> dict[str, tuple[bool, ...]]:
    return {str(number): GOOD if number < hits else BAD for number in range(count)}


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


@pytest.fixture
def runs(tmp_path):
    finished_run(tmp_path / "memit", cases(11))
    finished_run(tmp_path / "rome", cases(3), "rome")
    return tmp_path


def test_differences_from_a_reference(runs, cli):
    ended = cli("compare", "memit", "rome", "--against", "rome", "--format", "csv")
    found = {(row["run"], row["metric"]): row for row in rows(ended.out)}
    mine = found["memit", "efficacy_success"]
    assert float(mine["difference"]) == pytest.approx(100 * 8 / 12)
    assert float(mine["p"]) == pytest.approx(stats.binomtest(8, 8).pvalue)
    assert float(mine["difference_low"]) < 100 * 8 / 12 < float(mine["difference_high"])
    assert (mine["pairs"], mine["reference"]) == ("12", "rome")
    assert float(mine["p_holm"]) == pytest.approx(min(1, float(mine["p"]) * 7))  # the smallest p of the seven on screen
    assert found["rome", "efficacy_success"]["difference"] == ""
    assert found["memit", "paraphrase_success"]["p"] == "1.0"
    shown = cli("compare", "memit", "--against", "rome").out  # which is added to them
    assert "Difference from rome over the same cases" in shown
    assert "+66.7" in shown
    assert "paired permutation test" in " ".join(shown.split())
    assert "Holm's method for the 7 comparisons" in " ".join(shown.split())


def test_intervals_stand_on_the_screen(runs, cli):
    summary = json.loads((runs / "rome" / "summary.json").read_text())
    low, high = summary["metrics"]["efficacy_success"]["after"]["ci95"]
    assert f"[{low:.0f}, {high:.0f}]" in cli("compare", "rome").out


def test_only_cases_that_both_have_are_paired(runs, cli):
    some = {case: hits for case, hits in cases(12).items() if int(case) < 7}
    finished_run(runs / "part", some, "ft")
    found = rows(cli("compare", "part", "--against", "rome", "--format", "csv", "--metrics", "efficacy_success").out)
    mine = next(row for row in found if row["run"] == "ft")
    assert (mine["pairs"], float(mine["difference"])) == ("7", pytest.approx(100 * 4 / 7))


def test_how_a_judge_would_be_asked_sets_no_runs_apart_as_long_as_none_is(runs, cli):
    asked = {"generate": True, "max_new_tokens": 20, "seed": 0}
    for name, judge in (("later", None), ("judged", "model-of-theirs")):
        observe = {**asked, "judge": {"model": judge, "temperature": 0.0}}
        finished_run(runs / name, cases(5), "ft", protocol={"observe": observe})
    assert cli("compare", "memit", "later").code == 0
    ended = cli("compare", "memit", "judged")
    assert ended.code == 2 and "protocol.observe.judge.model is" in ended.err


def test_the_end_of_a_sequence_is_what_is_paired(runs, cli):
    for name, hits in (("first", 12), ("second", 6)):
        finished_run(runs / name, cases(hits), name, command="sequential")
    ended = cli("compare", "first", "second", "--against", "second", "--format", "csv", "--metrics", "efficacy_success")
    (mine,) = [row for row in rows(ended.out) if row["difference"]]
    assert (mine["run"], mine["facts"]) == ("first", "12")
    assert float(mine["mean"]) == pytest.approx(100 * 11 / 12)
    assert float(mine["difference"]) == pytest.approx(100 * 6 / 12)


def test_runs_that_differ_in_seed_alone_are_one_row(runs, cli):
    for seed, hits in enumerate((4, 6, 11)):
        finished_run(runs / f"ft-seed{seed}", cases(hits), "ft", seed=seed)
    ended = cli("compare", "ft-seed*", "--against", "rome", "--metrics", "efficacy_success", "--format", "csv")
    ft, rome = rows(ended.out)
    values = [100 * hits / 12 for hits in (4, 6, 11)]
    assert (ft["run"], ft["seeds"], rome["seeds"]) == ("ft", "3", "1")
    assert float(ft["mean"]) == pytest.approx(statistics.mean(values))
    assert float(ft["sd"]) == pytest.approx(statistics.stdev(values))
    assert float(ft["difference"]) == pytest.approx(statistics.mean(values) - 25)
    shown = " ".join(cli("compare", ".").out.split())
    assert "± 30.0" in shown and "standard deviation between runs that differ in their seeds alone" in shown


def test_other_settings_and_repeated_runs_are_other_rows(runs, cli):
    finished_run(runs / "rome-more", cases(5), "rome", seed=1, limit=9)
    finished_run(runs / "rome-again", cases(3), "rome")
    names = [row["run"] for row in rows(cli("compare", ".", "--metrics", "efficacy_success", "--format", "csv").out)]
    assert names == ["memit", "rome", "rome-again", "rome-more"]


def test_runs_in_folders_of_one_name_are_told_apart(runs, cli):
    """By their settings; by where they lie where these are the same."""
    csv = ("--metrics", "efficacy_success", "--format", "csv")
    for folder, steps in (("x", 5), ("y", 1), ("z", 1)):
        finished_run(runs / folder / "ft", cases(steps), "ft", limit=steps)
    two = rows(cli("compare", "x/ft", "y/ft", *csv).out)
    assert [row["run"] for row in two] == ["ft limit=5", "ft limit=1"]
    assert [float(row["mean"]) for row in two] == [pytest.approx(100 * 5 / 12), pytest.approx(100 / 12)]
    along = rows(cli("compare", "x/ft", "y/ft", "--x", "protocol.batch_size", *csv).out)
    assert sorted(row["run"] for row in along) == ["ft limit=1", "ft limit=5"]
    three = [row["run"] for row in rows(cli("compare", "x/ft", "y/ft", "z/ft", *csv).out)]
    assert three == ["ft limit=5", "ft limit=1 (y/ft)", "ft limit=1 (z/ft)"]


def test_a_sequence_that_was_stopped_is_not_paired_with_a_whole_one(runs, cli):
    finished_run(runs / "whole", cases(12), "first", command="sequential")
    finished_run(runs / "stopped", dict(list(cases(12).items())[:4]), "second", command="sequential")
    ended = cli("compare", "whole", "stopped", "--against", "whole", "--metrics", "efficacy_success")
    assert ended.code == 0 and "Difference" not in ended.out
    told = "second ended with 4 facts in place, others with 12: their rows tell of fewer edits and are not paired"
    assert told in ended.words


def test_replies_decide_what_is_right_in_a_stream_of_mistakes(runs):
    from edit_cli.commands.compare_conditions import conditions
    from edit_cli.runs.record import read_run

    record = read_run(runs / "memit")
    assert "protocol.observe.generate" not in conditions(record)
    record.manifest["protocol"]["kind"] = "sme"
    assert conditions(record)["protocol.observe.generate"] is True


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"dataset": {"replies": 8, "path": "other.json"}}, "dataset.replies is null (memit) and 8 (other)"),
        ({"model": {"name": "m", "id": "m", "dtype": "float32", "beams": 5}}, "model.beams is null (memit) and 5"),
        ({"ids": "b" * 64}, "record ids is aaaaaaaa… (memit) and bbbbbbbb… (other)"),
        ({"model": {"name": "n", "id": "n"}}, "model is m (memit) and n (other)"),
        (
            {"model": {"name": "m", "id": "m", "dtype": "bfloat16"}},
            "model.dtype is float32 (memit) and bfloat16 (other)",
        ),
        ({"protocol": {"batch_size": 4}}, "protocol.batch_size is 1 (memit) and 4 (other)"),
        ({"command": "edit", "base_edit": "x"}, "command is evaluate (memit) and edit (other)"),
        ({"data": {"sha256": "e" * 64}}, "data file is dddddddd… (memit) and eeeeeeee… (other)"),
    ],
)
def test_unlike_runs_stand_in_no_column(runs, cli, other, told):
    finished_run(runs / "other", cases(5), "ft", **other)
    refused = cli("compare", "memit", "other")
    assert (refused.code, refused.out) == (2, "")
    assert told in refused.err and "--anyway" in refused.err
    assert len(refused.err.strip().splitlines()) == 1
    assert ("--x protocol.batch_size" in refused.err) == ("batch_size" in told)  # where nothing else differs
    listed = cli("compare", "memit", "other", "--anyway", "--against", "memit", "--format", "csv")
    found = rows(listed.out)
    assert len({row["conditions"] for row in found}) == 2
    assert not any(row["difference"] for row in found)


def test_methods_that_edit_one_or_many_facts_by_themselves_are_listed_apart(tmp_path, cli):
    """Not refused, as nobody has asked for other sizes; and never in one column."""
    for name, hits, size in (("memit", 11, 100), ("emmet", 9, 100), ("rome", 3, 1)):
        finished_run(tmp_path / name, cases(hits), name, by_itself=size)
    ended = cli("compare", ".", "--against", "memit", "--metrics", "efficacy_success", "--format", "csv")
    found = {row["run"]: row for row in rows(ended.out)}
    assert {name: row["conditions"] for name, row in found.items()} == {
        "memit": "batch_size 12", "emmet": "batch_size 12", "rome": "batch_size 1"
    }  # fmt: skip
    assert found["emmet"]["difference"] and not found["rome"]["difference"]
    shown = " ".join(cli("compare", ".").out.split())
    assert "Runs with the same protocol.batch_size stand in one table" in shown
    finished_run(tmp_path / "given", cases(5), "rome", protocol={"batch_size": 4})
    assert cli("compare", ".").code == 2
    finished_run(tmp_path / "few" / "emmet", cases(2, 2), "emmet", by_itself=100)
    finished_run(tmp_path / "few" / "rome", cases(2, 2), "rome", protocol={"batch_size": 2})
    assert cli("compare", "few").code == 0  # two facts, both at once either way


def test_unlike_runs_are_lines_of_their_own_in_a_figure(tmp_path, cli):
    for name, dtype in (("one", "float32"), ("two", "bfloat16")):
        finished_run(tmp_path / name, cases(5), model={"name": "m", "id": "m", "dtype": dtype})
    assert cli("compare", "one", "two", "--x", "seed", "--anyway", "--out", "figure").code == 0
    drawn = (tmp_path / "figure.svg").read_text()
    assert "memit (model.dtype bfloat16)" in drawn and "memit (model.dtype float32)" in drawn


def test_what_only_adds_figures_makes_no_run_unlike(runs, cli):
    finished_run(
        runs / "other",
        cases(5),
        "ft",
        protocol={"save_edits": True, "observe": {"generate": False, "max_new_tokens": 20}},
    )
    assert cli("compare", "memit", "other").code == 0


def test_along_an_axis_the_rest_may_move_and_is_told(runs, cli):
    finished_run(runs / "four", cases(5), "memit", protocol={"batch_size": 4}, ids="b" * 64)
    ended = cli("compare", "memit", "four", "--x", "protocol.batch_size", "--format", "csv")
    assert ended.code == 0
    assert "along protocol.batch_size, the runs differ in record ids, too" in ended.err


def test_a_folder_leaves_out_what_cannot_be_compared(runs, cli):
    finished_run(runs / "unfinished", cases(5), "ft")
    (runs / "unfinished" / "summary.json").unlink()
    ended = cli("compare", str(runs))
    assert ended.code == 0
    assert "left out" in ended.err and "unfinished" in ended.err
    assert cli("compare", "unfinished").code == 3


def test_runs_of_edit_are_compared(runs, cli):
    for name, hits in (("one", 4), ("two", 9)):
        finished_run(runs / name, cases(hits), name, command="edit")
    ended = cli("compare", "one", "two", "--against", "one", "--format", "csv", "--metrics", "efficacy_success")
    one, two = rows(ended.out)
    assert one["difference"] == ""
    assert float(two["difference"]) == pytest.approx(100 * 5 / 12)


def test_trainings_are_compared(tmp_path, cli):
    for seed, loss in enumerate((1.0, 2.0)):
        finished_training(tmp_path / f"training-{seed}", loss, seed)
    found = {row["metric"]: row for row in rows(cli("compare", ".", "--format", "csv").out)}
    assert (float(found["best_loss"]["mean"]), found["best_loss"]["seeds"]) == (1.5, "2")
    assert float(found["best_loss"]["sd"]) == pytest.approx(0.5**0.5)
    assert "1.500" in cli("compare", ".").out


def test_columns_that_do_not_fit_stand_below(runs, cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    every = (
        "efficacy_success,paraphrase_success,neighborhood_success,score,efficacy_generated_contains,efficacy_magnitude"
    )
    shown = cli("compare", "memit", "rome", "--against", "rome", "--metrics", every).out.splitlines()
    assert max(map(len, shown)) <= 40
    heads = [line for line in shown if line.startswith("run ")]
    assert len(heads) > 2 and sum("magnitude" in line for line in heads) == 2
    assert sum(line.startswith("memit ") for line in shown) == len(heads)


def test_published_columns_are_those_of_the_table_at_any_width(runs, cli, monkeypatch):
    """What is told below them is of all columns, not of those that stand last."""
    given = ("compare", "rome", "--published", "rome-counterfact")
    monkeypatch.setenv("COLUMNS", "50")
    narrow = cli(*given).out
    assert "none of these metrics" not in narrow and "NOT COMPARABLE" in narrow
    table = cli(*given, "--format", "markdown").out.split("**Published (rome-counterfact)**")[1]
    heads = next(line for line in table.splitlines() if line.startswith("| run"))
    assert "Efficacy success" in heads and "contains" not in heads


def test_files_of_others_are_not_written_over(runs, cli):
    (runs / "both.md").write_text("my notes")
    told = cli("compare", "memit", "rome", "--out", "both")
    assert told.code == 2 and "--out both: both.md is there already" in told.err and not (runs / "both.csv").exists()
    for command, name in (("compare", "f.csv"), ("compare", "f.md"), ("compare", "f.tex"), ("report", "page.html")):
        (runs / name).write_text("case,x\n")
        refused = cli(command, "memit", "rome", "--out", name)
        assert refused.code == 2 and f"{name} is there already and holds something else" in refused.err
        assert (runs / name).read_text() == "case,x\n"
        (runs / name).unlink()
        assert [cli(command, "memit", "rome", "--out", name).code for _ in range(2)] == [0, 0]  # its own, again


def test_latex_by_the_suffix(runs, cli):
    finished_run(runs / "odd", cases(5), "a_b%", protocol={"batch_size": 1})
    ended = cli("compare", "rome", "odd", "--against", "rome", "--out", "tables/t.tex", "--metrics", "efficacy_success")
    assert ended.last.endswith("t.tex")
    assert [file.name for file in (runs / "tables").iterdir()] == ["t.tex"]
    text = (runs / "tables" / "t.tex").read_text()
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == text.count(r"\toprule") == 2
    assert r"Efficacy success, \%" in text and r"a\_b\% & 41.7" in text
    assert "+16.7" in text
    for line in re.findall(r".* \\\\$", text, re.MULTILINE):
        assert not re.search(r"(?<!\\)[%_#]", line)


def test_markdown_holds_the_same_numbers(runs, cli):
    made = cli("compare", "memit", "rome", "--against", "rome", "--format", "markdown", "--metrics", "efficacy_success")
    lines = [line for line in made.out.splitlines() if line.startswith("| ")]
    assert lines[2].startswith("| memit | 91.7 [")
    assert any(line.startswith("| memit | +66.7 [") for line in lines)
    cli("compare", "memit", "rome", "--against", "rome", "--out", "same.md", "--metrics", "efficacy_success")
    assert (runs / "same.md").read_text() == made.out


def test_published_numbers_stand_beside_and_say_what_differs(runs, cli):
    shown = " ".join(cli("compare", "memit", "--published", "rome-counterfact").out.split())
    assert "ROME on gpt2-xl" in shown and "Meng et al. (2022)" in shown
    assert "NOT COMPARABLE as they stand; these runs differ in model (m here" in shown
    finished_run(runs / "xl", cases(5, 20), "rome", model={"name": "gpt2-xl", "id": "gpt2-xl"})
    shown = " ".join(cli("compare", "xl", "--published", "rome-counterfact").out.split())
    assert "gpt-j" not in shown  # only the model that was edited
    assert "these runs differ in cases (20 here, 7,500 there)" in shown
    found = rows(cli("compare", "xl", "--published", "rome-counterfact", "--format", "csv").out)
    theirs = next(row for row in found if row["run"] == "ROME on gpt2-xl" and row["metric"] == "paraphrase_success")
    assert [float(theirs[end]) for end in ("mean", "low", "high")] == pytest.approx([96.4, 96.1, 96.7])
    assert theirs["published"].startswith("Meng et al. (2022)")
    assert np.isfinite([float(row["mean"]) for row in found]).all()
