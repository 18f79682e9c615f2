"""`tune`: what is searched, what counts, that a killed search goes on, and that its result is found."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from omegaconf import OmegaConf
from optuna.trial import FixedTrial

from edit_cli.commands import tune
from edit_cli.config import catalog
from edit_cli.config.registry import target
from edit_cli.config.users import tuned_file, with_tuned, written
from edit_cli.errors import MissingError, UsageError
from edit_cli.tuning import spaces
from edit_cli.tuning.objective import Objective, difference, penalty
from edit_cli.tuning.study import Search

SMALL = ("tune", "limit=4", "protocol.observe.max_new_tokens=3", "protocol.observe.perplexity=false")
METHODS = "rome r-rome memit emmet pmet alphaedit ft ft-l lora grace wise melo tpatcher ultraedit".split()


def settings_class(method: str) -> type:
    name = catalog.target_of("method", method)
    assert name is not None
    return target(name, "method").Config


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    """The user's folder of settings."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "edit-cli" / "tuned"


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]


def untimed(run: Path) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in ("seconds", "spent")} for line in lines(run)]


# --- what is searched -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("depth", [2, 6, 48])
def test_what_a_space_proposes_the_method_takes(method, depth):
    made = settings_class(method)
    space = spaces.SPACES[method]
    search = Search(space, depth, seed=3)
    start = {key: values.placeholder() for key, values in space.items() if "." not in key}
    for number in range(4):
        trial, settings = search.ask(number)
        config = tune.with_settings(made(**start), settings)
        used = [*(getattr(config, "layers", None) or ()), getattr(config, "layer", None) or 0]
        assert used and max(used) < depth
        search.tell(trial, float(number))


def test_windows_by_hand():
    window = spaces.Window(0.0, 1.0, widest=3)
    assert window.propose("layers", FixedTrial({"layers.last": 5, "layers.count": 3}), 6, {}) == [3, 4, 5]
    assert window.propose("layers", FixedTrial({"layers.last": 1, "layers.count": 3}), 6, {}) == [0, 1]
    assert window.parameters("layers", [3, 4, 5], 6) == {"layers.last": 5, "layers.count": 3}
    assert window.parameters("layers", [1, 4], 6) == window.parameters("layers", [1, 2, 3, 4], 6) == {}
    assert list(spaces.Window(0.5, 0.6, widest=2).reachable(11)) == [4, 5, 6]


def test_what_is_written_is_what_was_tried():
    found = spaces.Real(1.0, 1e5).propose("x", FixedTrial({"x": 1234.5678}), 6, {})
    assert found == 1230.0


# --- what counts ------------------------------------------------------------------------------------------------------


def trial(parts: dict[str, list[float]], factor: float = 1.0) -> dict:
    count = len(next(iter(parts.values())))
    return {
        "facts": {str(i): {part: values[i] for part, values in parts.items()} for i in range(count)},
        "penalty": factor,
    }


def test_the_objective_by_hand():
    objective = Objective({part: part for part in ("efficacy", "paraphrase", "neighborhood", "written")})
    assert objective.score([100.0, 50.0, 100.0, 60.0]) == pytest.approx(0.75 * 75.0 + 0.25 * 60.0)
    assert objective.score([100.0, 0.0, 100.0, 100.0]) == 25.0
    assert Objective({"efficacy": "x", "neighborhood": "y"}).score([50.0, 100.0]) == pytest.approx(200 / 3)


def test_perplexity_costs_beyond_its_bound_only():
    assert [penalty(10.0, after) for after in (5.0, 11.0, 22.0, math.inf)] == [1.0, 1.0, 0.5, 0.0]
    assert penalty(None, None) == 1.0


def test_the_interval_is_over_the_same_facts():
    objective = Objective({"efficacy": "efficacy", "neighborhood": "neighborhood"})
    same = trial({"efficacy": [100.0, 0.0, 100.0, 0.0], "neighborhood": [100.0] * 4})
    assert difference(objective, same, same, 0) == (0.0, (0.0, 0.0))
    better = trial({"efficacy": [100.0] * 4, "neighborhood": [100.0] * 4})
    mean, interval = difference(objective, better, same, 0)
    assert mean == pytest.approx(100 - 200 / 3) and interval is not None
    assert interval[0] < mean < interval[1] and interval[0] >= 0.0


def test_facts_that_fail_count_as_lost():
    objective = Objective({"efficacy": "efficacy_success", "neighborhood": "locality_disagreement"})
    failed = {"case_id": "a", "step": 0, "error": "no", "before": {"probes": []}, "after": None}
    assert objective.parts([failed]) == [{"efficacy": 0.0, "neighborhood": 0.0}]
    assert np.array_equal(objective.rows(objective.parts([failed])), [[0.0, 0.0]])


# --- the user's settings ----------------------------------------------------------------------------------------------


def node():
    return OmegaConf.create(
        {"model": {"name": "org/m"}, "method": {"layers": "???", "lr": 1.0, "value": {"lr": 0.5, "steps": 20}}}
    )


def test_the_users_settings_stand_above_packaged_ones_and_below_the_command_line(own):
    file = tuned_file("memit", "org/m")
    assert file == own / "memit" / "org_m.yaml"
    assert with_tuned(node(), "memit", []) is None
    file.parent.mkdir(parents=True)
    file.write_text(written({"layers": [3, 4], "lr": 1e-5, "value.lr": 0.1, "value.steps": 30}, "found"))
    config = node()
    assert with_tuned(config, "memit", ["method.value.lr"]) == file
    assert config.method == {"layers": [3, 4], "lr": 1e-5, "value": {"lr": 0.5, "steps": 30}}


def test_bad_files_of_the_user_are_named(own):
    file = tuned_file("memit", "org/m")
    file.parent.mkdir(parents=True)
    for text, error in (
        ("layer: 3", UsageError),
        ("_target_: x.Y", UsageError),
        ("[3]", MissingError),
        ("a: [", MissingError),
    ):
        file.write_text(text)
        with pytest.raises(error, match=r"org_m\.yaml"):
            with_tuned(node(), "memit", [])


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_search_goes_on_as_if_it_had_not_been(cli, own, monkeypatch):
    asked = (*SMALL, "method=ft", "method.steps=3", "trials=2")
    assert cli(*asked, "run_dir=whole", "out=whole.yaml").code == 0
    tried, seen = tune.Bench._tried, list[dict]()

    def dies(self, settings, *rest):
        if len(seen) == 1:
            raise KeyboardInterrupt
        seen.append(settings)
        return tried(self, settings, *rest)

    monkeypatch.setattr(tune.Bench, "_tried", dies)
    assert cli(*asked, "run_dir=killed").code == 130
    assert len(lines(Path("killed"))) == 1 and not list(own.rglob("*.yaml"))
    monkeypatch.setattr(tune.Bench, "_tried", tried)
    ended = cli(*asked, "run_dir=killed")
    assert ended.code == 0 and "continuing: 1 trial" in ended.err
    assert untimed(Path("killed")) == untimed(Path("whole"))

    found = yaml.safe_load((own / "ft" / "tiny-gpt2.yaml").read_text())
    best = max(lines(Path("whole")), key=lambda line: line["objective"])
    assert found == best["settings"] | {"steps": 3} == yaml.safe_load(Path("whole.yaml").read_text())
    assert lines(Path("whole"))[0]["settings"] == {"layers": [0], "lr": 5e-3}  # the published ones come first
    rows = Path("killed/trials.csv").read_text().splitlines()
    assert len(rows) == 3 and rows[1].startswith(f"{best['trial']},")
    assert Path("killed/tradeoff.png").stat().st_size and "2 trials, best first" in ended.out
    assert "split tune" in ended.words and "95 % interval over 4 facts" in ended.words

    monkeypatch.setattr(tune.Bench, "_tried", dies)  # nothing is tried again
    again = cli(*asked, "run_dir=killed")
    assert again.code == 0 and "done already" in again.err and "best first" in cli("show", "killed").out
    shown = cli("show-config", "ft", "model=tiny-gpt2")
    assert "With what tune found" in shown.out and f"method.lr={found['lr']}" in shown.out


def test_every_run_finds_what_was_found(cli, own):
    file = own / "ft" / "tiny-gpt2.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("layers: [1]\nlr: 0.002\nsteps: 2\n")
    ended = cli("evaluate", "method=ft", "method.lr=0.004", "limit=1", "run_dir=run", quick=True)
    assert ended.code == 0 and f"found by tune: {file}" in ended.err
    method = json.loads(Path("run/manifest.json").read_text())["config"]["method"]
    assert (method["layers"], method["lr"], method["steps"]) == ([1], 0.004, 2)


def test_other_settings_that_are_there_are_kept(cli, own):
    file = own / "ft" / "tiny-gpt2.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("lr: 0.002\n")
    given = ("method=ft", "method.steps=10", "method.layers=[0]", "trials=1")
    ended = cli(*SMALL, *given)
    assert ended.code == 0 and "the only one" in ended.out
    assert file.with_name("tiny-gpt2.yaml.old").read_text() == "lr: 0.002\n"
    assert yaml.safe_load(file.read_text()) == {"layers": [0], "steps": 10, "lr": 5e-3}


def test_the_last_records_of_a_file_are_taken_and_named(cli, own):
    rows = [
        {
            "prompt": "{} plays the",
            "subject": f"Jormia {name}",
            "target_new": "organ",
            "neighbors": ["Jormia Z plays the"],
        }
        for name in "ABCDEF"
    ]
    Path("facts.json").write_text(json.dumps(rows))
    ended = cli(
        "tune", "method=ft", "dataset=facts", "dataset.path=facts.json", "limit=4", "trials=1", "method.steps=1"
    )
    assert ended.code == 0, ended.err
    assert "leave them out of what you report (limit=2)" in ended.words
    about = json.loads(next(Path("runs").rglob("manifest.json")).read_text())
    assert about["protocol"]["facts"].startswith("the last 4 of 6 records")
    assert about["dataset"]["offset"] == 2


@pytest.mark.parametrize(
    ("wrong", "code", "message"),
    [
        ("method=mend", 2, "method=mend cannot be tuned: choose one of"),
        ("budget=20", 2, "budget=20: give a time"),
        ("budget=0s", 2, "budget=0s: give a time"),
        ("trials=null", 2, "nothing would end the search"),
        ("limit=3", 2, "3 facts (split tune"),
        ("trials=0", 2, "trials=0: give a whole number"),
        ("budget=0.001s", 2, "before a first trial"),
        ("method.lr=1e-3 method.layers=[1] method.steps=2", 2, "every setting of method=ft that is searched is given"),
        ("dataset.path=/none.json", 3, "/none.json"),
        ("out=.", 2, "out=. is a folder: name a file in it"),
    ],
)
def test_bad_input_is_told_in_a_line(cli, own, wrong, code, message):
    ended = cli(*SMALL[:1], "limit=4", "method=ft", *wrong.split())
    assert ended.code == code and message in ended.err
    assert "Traceback" not in ended.err and not list(own.rglob("*.yaml"))


def test_a_missing_library_is_named(cli, own, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    ended = cli(*SMALL, "method=ft")
    assert ended.code == 3 and "pip install 'edit-cli[tune]'" in ended.err


def test_settings_that_a_method_refuses_are_a_bad_trial_and_no_end(cli, own, monkeypatch):
    tried = []

    def refuses(config, settings):
        tried.append(settings)
        if len(tried) == 2:
            raise UsageError("method.lr: not this one")
        return real(config, settings)

    real = tune.with_settings
    monkeypatch.setattr(tune, "with_settings", refuses)
    ended = cli(*SMALL, "method=ft", "method.steps=10", "method.layers=[0]", "trials=2", "run_dir=run")
    assert ended.code == 0
    assert [line["failed"] for line in lines(Path("run"))] == [0, 4]
    assert "not this one" in ended.words
