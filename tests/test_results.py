"""Run directories: starting, continuing, refusing, reading."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edit_cli.config.identity import config_hash, differences, flatten
from edit_cli.errors import MissingError, UsageError
from edit_cli.runs import environment as env
from edit_cli.runs.record import list_runs, read_run
from edit_cli.runs.run import Run

CONFIG = {"method": {"name": "memit", "layers": [3, 4]}, "seed": 0, "run_dir": None}


def start(path: Path, config: dict | None = None, **options) -> Run:
    return Run.open(
        path, "notes", CONFIG if config is None else config, made_with={"versions": {"torch": "1"}}, **options
    )


# A command whose lines have no form of their own: what every run directory has in common.
def line(case: str, **rest) -> dict:
    return {"case_id": case, "step": 0, "before": None, "after": None, "error": None, **rest}


def test_a_run_leaves_manifest_results_and_summary(tmp_path):
    with start(tmp_path / "a" / "run", details={"seeds": {"data": 3}}) as run:
        assert read_run(run.path).status == "started"
        run.append(line("1", seconds=0.5))
        run.append(line("2"))
        run.log("half way")
        run.write_summary({"n": 2})
    record = read_run(tmp_path / "a" / "run")
    assert record.status == "success" and record.manifest["finished"] >= record.manifest["started"]
    assert record.manifest["config"] == CONFIG and record.manifest["seeds"] == {"data": 3}
    assert record.manifest["versions"] == {"torch": "1"}
    assert [found["case_id"] for found in record.lines] == ["1", "2"]
    assert record.summary == {"format": 2, "command": "notes", "n": 2, "lines": 2}
    assert "half way" in (record.path / "log.txt").read_text()


@pytest.mark.parametrize(("error", "status"), [(RuntimeError, "failed"), (KeyboardInterrupt, "interrupted")])
def test_how_the_block_ends_is_the_status(tmp_path, error, status):
    with pytest.raises(error), start(tmp_path / "run"):
        raise error
    assert read_run(tmp_path / "run").status == status


def test_the_same_configuration_continues(tmp_path):
    with start(tmp_path / "run") as run:
        run.append(line("1"))
    with start(tmp_path / "run") as run:
        assert run.finished == {"1"}
        run.append(line("2"))
        assert [found["case_id"] for found in run.lines()] == ["1", "2"]
    assert len(read_run(tmp_path / "run").manifest["resumed"]) == 1


def test_what_changed_between_starts_is_recorded(tmp_path):
    with start(tmp_path / "run") as run:
        first = run.manifest["started"]
    with Run.open(tmp_path / "run", "notes", CONFIG, made_with={"versions": {"torch": "2"}}) as run:
        assert run.manifest["resumed"][0]["changed"] == {"versions.torch": ["1", "2"]}
        assert run.manifest["versions"] == {"torch": "1"} and run.manifest["started"] == first


def test_ignored_keys_do_not_identify_a_run(tmp_path):
    options = {"ignore": ("run_dir", "stats.cache")}
    with start(tmp_path / "run", CONFIG | {"stats": {"cache": "x", "dtype": "float32"}}, **options) as run:
        run.append(line("1"))
    with start(
        tmp_path / "run", CONFIG | {"run_dir": "elsewhere", "stats": {"cache": "y", "dtype": "float32"}}, **options
    ) as run:
        assert run.manifest["config"]["run_dir"] == "elsewhere"
    with pytest.raises(UsageError, match="stats.dtype"):
        start(tmp_path / "run", CONFIG | {"stats": {"cache": "x", "dtype": "float64"}}, **options)


def test_another_configuration_is_refused_by_name(tmp_path):
    with start(tmp_path / "run") as run:
        run.append(line("1"))
    other = {"method": {"name": "memit", "layers": [5]}, "run_dir": None, "tag": "b"}
    with pytest.raises(UsageError) as refusal:
        start(tmp_path / "run", other)
    message = str(refusal.value)
    assert "method.layers was [3, 4] and is [5]" in message
    assert "seed was 0 and is (unset)" in message and 'tag was (unset) and is "b"' in message
    assert "method.name" not in message
    assert all(remedy in message for remedy in ("run_dir=DIR", "tag=NAME", "overwrite=true")) and "\n" not in message
    assert len(read_run(tmp_path / "run").lines) == 1


def test_a_run_that_came_to_nothing_gives_way(tmp_path):
    with pytest.raises(UsageError), start(tmp_path / "run") as run:
        run.log("error: no such checkpoint")
        raise UsageError("no such checkpoint")
    with start(tmp_path / "run", CONFIG | {"seed": 9}) as run:
        assert run.manifest["config"]["seed"] == 9 and "resumed" not in run.manifest


def test_another_command_is_refused(tmp_path):
    with start(tmp_path / "run") as run:
        run.append(line("1"))
    with pytest.raises(UsageError, match="holds a run of `notes`, not of `sequential`"):
        Run.open(tmp_path / "run", "sequential", CONFIG, made_with={})


def test_the_most_memory_stays_when_a_command_is_given_again(tmp_path):
    def most() -> dict:
        summary = read_run(tmp_path / "run").summary
        assert summary is not None
        return summary["peak_memory_bytes"]

    for now, wanted in (({"host": 5, "device": None}, 5), ({"host": 3, "device": 7}, 5), ({"host": 6, "device": 2}, 6)):
        with start(tmp_path / "run") as run:
            run.write_summary({"peak_memory_bytes": now})
        assert most()["host"] == wanted
    assert most()["device"] == 7
    (tmp_path / "run" / "summary.json").write_text("{")
    with start(tmp_path / "run") as run:
        run.write_summary({"peak_memory_bytes": {"host": 2, "device": None}})
    assert most() == {"host": 2, "device": None}


def test_overwrite_starts_again(tmp_path):
    with start(tmp_path / "run") as run:
        run.append(line("1"))
        run.edits.mkdir()
        run.write_summary({})
    (tmp_path / "run" / "notes.md").write_text("mine")
    with start(tmp_path / "run", {"seed": 9}, overwrite=True) as run:
        assert run.finished == set() and run.lines() == [] and not run.edits.exists()
        assert run.manifest["config"] == {"seed": 9} and "resumed" not in run.manifest
    record = read_run(tmp_path / "run")
    assert record.summary is None and (record.path / "notes.md").read_text() == "mine"


def test_a_directory_with_other_things_is_never_touched(tmp_path):
    (tmp_path / "edits").mkdir()
    (tmp_path / "edits" / "thesis.txt").write_text("dear")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="not empty and holds no run .*edits.*run_dir=DIR"):
            start(tmp_path, overwrite=overwrite)
    assert (tmp_path / "edits" / "thesis.txt").read_text() == "dear" and len(list(tmp_path.iterdir())) == 1


def test_results_without_their_manifest_are_not_deleted(tmp_path):
    with start(tmp_path / "run") as run:
        run.append(line("1"))
    (tmp_path / "run" / "manifest.json").unlink()
    with pytest.raises(UsageError, match=r"results\.jsonl"):
        start(tmp_path / "run", overwrite=True)
    assert (tmp_path / "run" / "results.jsonl").stat().st_size > 0


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(MissingError, match="cannot be used as a run directory"):
        start(tmp_path / "run")


def test_no_line_twice(tmp_path):
    with start(tmp_path / "run") as run:
        run.append(line("1"))
        with pytest.raises(ValueError, match="already has a line for '1'"):
            run.append(line("1"))
    assert len(read_run(tmp_path / "run").lines) == 1


def test_lines_may_be_identified_by_several_fields(tmp_path):
    with start(tmp_path / "run", key=("case_id", "edits")) as run:
        run.append(line("1", edits=10))
        run.append(line("1", edits=20))
    with start(tmp_path / "run", key=("case_id", "edits")) as run:
        assert run.finished == {("1", 10), ("1", 20)}


def test_lines_are_strict_json_whatever_they_hold(tmp_path):
    with start(tmp_path / "run") as run:
        run.append(line("1", seconds=float("nan"), after={"x": [float("inf"), 1.5]}, text="\u2028 \ud800 ünd\n"))
    raw = (tmp_path / "run" / "results.jsonl").read_bytes()
    assert raw.count(b"\n") == 1 and b"NaN" not in raw and b"Infinity" not in raw
    (found,) = read_run(tmp_path / "run").lines
    assert found["seconds"] is None and found["after"] == {"x": [None, 1.5]} and found["text"] == "\u2028 \ud800 ünd\n"


def test_runs_are_listed_by_path_and_broken_ones_as_such(tmp_path):
    for name in ("b/two", "a/one", "c/three"):
        with start(tmp_path / name):
            pass
    (tmp_path / "c" / "three" / "manifest.json").write_text("{")
    one, two, three = list_runs(tmp_path)
    assert [record.path.name for record in (one, two, three)] == ["one", "two", "three"]
    assert one.status == two.status == "success"
    assert three.status == "unreadable" and "manifest.json" in three.manifest["error"]
    with pytest.raises(MissingError, match="no directory"):
        list_runs(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("manifest.json", None, "manifest.json is missing"),
        ("manifest.json", "[]", "holds no object"),
        ("manifest.json", '{"schema_version": 1}', "format 2 is what this version reads"),
        ("manifest.json", '{"format": 2, "command": "x"}', "is damaged: config_hash is missing"),
        ("summary.json", "{", "summary.json cannot be read"),
        ("results.jsonl", 'nonsense\n{"case_id": "2"}\n', "results.jsonl, line 1, is damaged"),
        ("results.jsonl", '3\n{"case_id": "2"}\n', "results.jsonl, line 1, is damaged"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, complaint):
    with start(tmp_path / "run") as run:
        run.append(line("1"))
    part = tmp_path / "run" / name
    part.unlink(missing_ok=True) if content is None else part.write_text(content)
    with pytest.raises(MissingError, match=re.escape(complaint)):
        read_run(tmp_path / "run")


def test_lines_without_the_identifying_field_are_named(tmp_path):
    with start(tmp_path / "run") as run:
        run.append(line("1"))
    (tmp_path / "run" / "results.jsonl").write_text('{"id": "1"}\n')
    with pytest.raises(MissingError, match="line 1, is damaged: case_id is missing"):
        start(tmp_path / "run")


def test_hash_depends_on_content_not_on_order():
    assert config_hash({"a": 1, "b": {"c": 2}}) == config_hash({"b": {"c": 2}, "a": 1})
    assert config_hash({"a": 1}) != config_hash({"a": 2})
    assert config_hash({"a": 1, "dir": "x"}, ["dir"]) == config_hash({"a": 1, "dir": "y"}, ["dir"])
    assert config_hash({"path": Path("x"), "pair": (1, 2)}) == config_hash({"path": "x", "pair": [1, 2]})


def test_whatever_changes_the_hash_is_named():
    for old, new in (
        ({"a": 1}, {"a": 1.0}),
        ({"a": [1]}, {"a": [True]}),
        ({"a": {}}, {"a": None}),
        ({"a": {"b": 1}}, {"a": 1}),
    ):
        assert config_hash(old) != config_hash(new) and differences(old, new)
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1, 2]}, ignore=["d"]) == {"a.b": 1, "a.c": {}}


def test_environment_names_versions_and_devices_but_no_place():
    found = env.environment()
    assert found["versions"]["torch"] and found["versions"]["python"] and found["devices"] and found["threads"] >= 1
    text = json.dumps(found)
    assert str(Path.home()) not in text and str(Path.cwd()) not in text


def git(directory: Path, *arguments: str) -> None:
    command = ["git", "-C", str(directory), "-c", "user.name=n", "-c", "user.email=e@example.org", *arguments]
    subprocess.run(command, check=True, capture_output=True)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_git_state(tmp_path):
    package = tmp_path / "checkout" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    assert env.git_state(package) is None
    git(package.parent, "init", "-q")
    assert env.git_state(package) is None  # lies in a repository, but is not part of it
    git(package.parent, "add", ".")
    git(package.parent, "commit", "-q", "-m", "first")
    state = env.git_state(package)
    assert state is not None
    assert re.fullmatch("[0-9a-f]{40}", state["commit"]) and state["dirty"] is False
    (package / "__init__.py").write_text("x = 1\n")
    state = env.git_state(package)
    assert state is not None and state["dirty"] is True


def test_reading_runs_imports_nothing_heavy():
    code = (
        "import sys, edit_cli.runs.run; print([m for m in ('torch', 'transformers', 'scipy', 'numpy') if m in"
        " sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
