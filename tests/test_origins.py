"""What a manifest says of how its run came to be: what was typed, and where each setting comes from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import invoke
from omegaconf import OmegaConf

from edit_cli.config import users
from edit_cli.config.build import register_resolvers
from edit_cli.config.composed import Composed
from edit_cli.config.origins import COMMAND_LINE, TUNE, origins


def composed(*overrides: str, arguments: tuple[str, ...] = (), searchpath: str | None = None) -> Composed:
    """What the command line would compose."""
    from hydra import compose, initialize_config_module
    from hydra.core.hydra_config import HydraConfig

    register_resolvers()
    more = [f"hydra.searchpath=[{searchpath}]"] if searchpath else []
    with initialize_config_module("edit_cli.conf", version_base="1.3"):
        whole = compose("evaluate", [*overrides, *more], return_hydra_config=True)
        HydraConfig.instance().set_config(whole)
    choices = {key: value for key, value in whole.hydra.runtime.choices.items() if not key.startswith("hydra/")}
    OmegaConf.set_struct(whole, False)
    del whole["hydra"]
    return Composed("evaluate", whole, choices, overrides=overrides, arguments=arguments)


def test_each_setting_tells_where_it_comes_from():
    found = origins(composed("method=memit", "limit=7", "method.value.steps=9", "protocol.observe.sample=false"))
    assert found["limit"] == found["method.value.steps"] == found["protocol.observe.sample"] == COMMAND_LINE
    assert found["method.layers"] == "conf/tuned/memit/tiny-gpt2.yaml"
    assert found["model.id"] == "conf/model/tiny-gpt2.yaml"
    assert "method.value.lr" not in found and "seed" not in found  # defaults
    assert origins(composed())["limit"] == "${model.default_limit}"


def test_what_tune_found_and_files_of_the_user_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    file = users.tuned_file("memit", "tiny-gpt2")
    file.parent.mkdir(parents=True)
    file.write_text("layers: [1]\nvalue: {lr: 0.1}\n")
    found = origins(composed("method=memit", "method.layers=[2]"))
    assert found["method.value.lr"] == TUNE and found["method.layers"] == COMMAND_LINE
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text("_target_: edit_cli.editors.locate.memit.MEMIT\nlayers: [3]\n")
    asked = composed("method=mine", arguments=("--config-dir", str(tmp_path)), searchpath=f"edit-cli://{tmp_path}")
    assert origins(asked)["method.layers"] == "method/mine.yaml"


FINISHED = ("evaluate", "method=lookup", "limit=2", "report=true")


def test_a_run_says_what_was_typed_and_writes_its_page(finished):
    ended, folder = finished
    run = folder / "runs/evaluate/counterfact/tiny-gpt2/lookup"
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["arguments"][:3] == ["method=lookup", "limit=2", "report=true"]
    assert manifest["origins"]["limit"] == COMMAND_LINE
    assert ended.code == 0 and f"page: {run.relative_to(folder)}/report.html" in ended.out
    page = (run / "report.html").read_text()
    assert "edit-cli evaluate method=lookup limit=2 report=true" in page and "command line" in page


def test_neither_page_nor_trackers_make_another_run(finished, monkeypatch, cache_dir):
    monkeypatch.chdir(finished[1])
    again = invoke(cache_dir, "evaluate", "method=lookup", "limit=2", quick=True)
    assert again.code == 0 and "all cases are there already" in again.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("method=look*",), "lookup"),
        (("limit=2", "status=success", "--sort", "efficacy_success"), "efficacy_success"),
        (("method=memit", "limit=2"), "no runs with method=memit limit=2"),
    ],
)
def test_runs_are_listed_by_what_they_are(arguments, told, look):
    ended = look("ls", "runs", *arguments)
    assert ended.code == 0 and told in ended.out.replace("efficacy", "efficacy_success")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("runs", "methd=memit"), "methd: no run has such a setting; did you mean method?"),
        (("runs", "memit"), "ls runs memit: write KEY=VALUE"),
        (("runs", "--sort", "efficacy_sucess"), "--sort efficacy_sucess: there is no such metric; did you mean"),
        (("runs", "--sort", "nothing"), "there is no such metric; `edit-cli ls metrics` lists them"),
        (("methods", "method=memit"), "ls methods: only runs are chosen by method=memit"),
    ],
)
def test_lists_that_make_no_sense_are_refused(arguments, told, look):
    ended = look("ls", *arguments)
    assert ended.code == 2 and told in ended.err and len(ended.err.splitlines()) == 1


def test_runs_are_sorted_best_first():
    from edit_cli.commands.ls import _sorted

    rows = [
        {"path": path, "metrics": {"perplexity": {"after": {"mean": mean}}} if mean else {}}
        for path, mean in (("worse", 9.0), ("none", None), ("better", 4.0))
    ]
    assert [row["path"] for row in _sorted(rows, "perplexity")] == ["better", "worse", "none"]


def test_trackers_that_are_not_there_are_refused_before_any_work(look, monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
    for name, told in (("wandb", "trackers: wandb is not installed: pip install wandb"),
                       ("tensorboard", "pip install 'edit-cli[tensorboard]'"),
                       ("tensorbord", "did you mean tensorboard?")):  # fmt: skip
        ended = look("evaluate", "method=lookup", f"trackers=[{name}]", "tag=tracked")
        assert ended.code == 2 and told in ended.err
    assert not Path("runs/evaluate/counterfact/tiny-gpt2/lookup-tracked").exists()


@pytest.mark.parametrize(
    ("command", "setting", "told"),
    [
        ("calibrate", "report=true", "`calibrate` keeps no run"),
        ("trace", "trackers=[tensorboard]", "`trace` has nothing to tell them"),
    ],
)
def test_what_a_command_cannot_do_with_them_is_refused(command, setting, told, look):
    ended = look(command, setting)
    assert ended.code == 2 and told in ended.err


def test_trackers_are_told_of_windows_checkpoints_and_the_end(tmp_path, monkeypatch):
    from fabricated import finished_run

    from edit_cli.experiment import tracking
    from edit_cli.runs.record import read_run

    record = read_run(finished_run(tmp_path / "run", {str(n): [True, n > 0, True] for n in range(3)}))
    monkeypatch.setattr(tracking, "WINDOW", 2)
    told: list[tuple[dict[str, float], int]] = []
    tracked = tracking.Told(lambda values, step: told.append((dict(values), step)), 0)
    for line in record.lines:
        tracked.line(line)
    tracked.means({"efficacy_success": {"mean": 75.0}, "perplexity": {"mean": None}}, 20)
    assert record.summary is not None
    tracked.end(record.summary)
    assert [step for _, step in told] == [2, 20, 3, 3]
    assert told[0][0]["window/paraphrase_success"] == 50.0 and told[1][0] == {"checkpoint/efficacy_success": 75.0}
    assert told[3][0]["after/efficacy_success"] == 100.0 and told[3][0]["seconds_per_edit"] == 0.5


class Listening:
    """A tracker that remembers what it is told, and writes to accelerate's log as those for W&B and trackio do."""

    requires_logging_directory = False

    def __init__(self, project: str, **names: str) -> None:
        self.told: list[object] = [project, names]

    def start(self) -> None:
        from accelerate.logging import get_logger

        get_logger("tracked").debug("started")
        HEARD.append(self.told)

    def store_init_configuration(self, values: dict[str, object]) -> None:
        self.told.append(dict(values))

    def log(self, values: dict[str, float], step: int) -> None:
        self.told.append((dict(values), step))

    def finish(self) -> None:
        self.told.append("finished")


class Offline(Listening):
    def start(self) -> None:
        raise ConnectionError("no such host\nand more")


HEARD: list[list[object]] = []


@pytest.fixture
def heard(monkeypatch) -> list[list[object]]:
    """What trackers named `wandb` are told, in a process where accelerate has not begun; `mlflow` does not start."""
    from accelerate import tracking
    from accelerate.state import PartialState

    monkeypatch.setattr(PartialState, "_shared_state", {})
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Listening)
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "mlflow", Offline)
    HEARD.clear()
    return HEARD


def test_a_tracker_may_use_the_log_of_accelerate(heard, tmp_path):
    from edit_cli.training.trackers import reporting

    with reporting(["wandb"], "edit-cli", Path("runs/evaluate/memit"), {"seed": 0}) as log:
        log({"after/efficacy_success": 100.0}, 3)
    names = {"name": "runs/evaluate/memit"}
    assert heard == [["edit-cli", names, {"seed": 0}, ({"after/efficacy_success": 100.0}, 3), "finished"]]


def test_a_tracker_that_does_not_start_is_told_in_a_line_and_the_others_are_finished(heard, tmp_path):
    from edit_cli.errors import MissingError
    from edit_cli.training.trackers import reporting

    told = r"mlflow does not start \(ConnectionError: no such host\): leave it out"
    with pytest.raises(MissingError, match=told), reporting(["wandb", "mlflow"], "edit-cli", tmp_path, {}):
        pass
    assert heard == [["edit-cli", {"name": tmp_path.name}, {}, "finished"]]


def test_tensorboard_gets_its_files(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from edit_cli.training.trackers import reporting

    with reporting(["tensorboard"], "edit-cli", tmp_path, {"seed": 0}) as log:
        log({"after/efficacy_success": 100.0}, 3)
    assert list(tmp_path.rglob("events.out.tfevents.*"))
