"""Training an editor in two processes: it really is two, they learn what one learns, and one writes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.commands import launch
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from conftest import Killed, invoke, json_lines
from embedded import same_bits
from safetensors.torch import load_file
from torch import nn

import edit_cli
from edit_cli.distributed import ProcessGroup
from edit_cli.editors.meta.base import TrainingConfig
from edit_cli.errors import MissingError, UsageError
from edit_cli.requests import Case
from edit_cli.training.loop import Training
from edit_cli.training.state import State
from edit_cli.training.zero import Zero, stage_of_launcher

CONFIGURATIONS = Path(__file__).parent.parent / "conf" / "accelerate"
CHEAP = (
    "train-editor", "method=mend", "dataset=world", "limit=20", "model.device=cpu", "method.layers=[5]",
    "method.rank=4", "method.training.edits=4",
    "method.training.steps=6", "method.training.validate_every=3", "method.training.validation_edits=5",
    "method.training.save_every=2",
    "method.training.log_every=1", "method.training.trackers=[]",
)  # fmt: skip


def training(name: str, *more: str) -> tuple[str, ...]:
    """A training that lies in `name`, checkpoint and all."""
    return (*CHEAP, f"run_dir={name}/run", f"cache_dir={name}", *more)


def trained(name: str, *more: str):
    ended = invoke(Path("unused"), *training(name, *more))
    assert ended.code == 0, ended.err


def curves(name: str) -> dict[tuple[int, str], dict]:
    return {(line.pop("step"), line.pop("kind")): line for line in json_lines(Path(name, "run/results.jsonl"))}


def members(name: str) -> list[int]:
    """The ids of the processes that took part, as they told each other; empty for one alone."""
    log = Path(name, "run/log.txt")
    found = re.findall(r"\d+ processes: ([\d, ]+)", log.read_text() if log.exists() else "")
    return [int(number) for number in found[-1].split(",")] if found else []


def network(name: str) -> dict:
    """The one checkpoint of a training."""
    (file,) = Path(name).glob("editors/*/editor.safetensors")
    return load_file(file)


def assert_alike(name: str, other: str) -> None:
    """The same curves and network, up to the order of sums in float32: what six steps make of that is below a
    thousandth.
    """
    mine, theirs = curves(name), curves(other)
    assert (
        mine.keys()
        == theirs.keys()
        == {*((step, "train") for step in range(1, 7)), (3, "validation"), (6, "validation")}
    )
    for key, line in mine.items():
        assert line == pytest.approx(theirs[key], rel=1e-3, abs=1e-5), key
    first, second = network(name), network(other)
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert (second[key] - value).norm() <= 1e-3 * value.norm() + 1e-6, key


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory):
    """A training in one process, `one`; all tests work in its folder."""
    folder = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("COLUMNS", "100")
        trained("one")
        yield


def killed_after_step_4(name: str, monkeypatch) -> None:
    real = State.save

    def save(self, step, *rest):
        real(self, step, *rest)
        if step == 4:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(State, "save", save)
        with pytest.raises(Killed):
            trained(name)
    assert not list(Path(name).glob("editors/*"))


@pytest.mark.slow
def test_a_killed_training_remembers_what_the_frozen_model_said_and_ends_in_the_same_bits(monkeypatch):
    """Asked again in other batches, the model would say it with other last digits."""
    killed_after_step_4("again", monkeypatch)
    assert [path.name for path in sorted(Path("again/run/state").glob("cache-*"))] == [
        "cache-0-00000002",
        "cache-0-00000004",
    ]
    trained("again")
    assert curves("again") == curves("one") and same_bits(network("again"), network("one"))
    assert not Path("again/run/state").exists()


@pytest.mark.slow
def test_a_training_that_one_began_is_finished_by_two(monkeypatch):
    """Killed after step 4 of 6: the two go on from there, to the same end."""
    killed_after_step_4("two", monkeypatch)
    trained("two", "processes=2")
    assert "training goes on at step 4 of 6" in Path("two/run/log.txt").read_text()
    assert len(set(members("two")) - {os.getpid()}) == 2 and members("one") == []
    assert_alike("two", "one")


def launched(name: str, configuration: str) -> None:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command = [*launcher, "--config_file", str(CONFIGURATIONS / configuration), "-m", "edit_cli", *training(name)]
    path = [str(Path(edit_cli.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    places = {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=600, env={**os.environ, **places}
    )
    assert ended.returncode == 0, ended.stderr
    assert len(set(members(name))) == 2
    assert ended.stdout.count("mend trained for tiny-gpt2") == 1


def assert_gone_on(name: str, told: str) -> None:
    log = Path(f"{name}/run/log.txt").read_text()
    assert told in log and "training goes on at step 4 of 6" in log
    assert_alike(name, "one")


@pytest.mark.slow
def test_accelerate_starts_two_with_the_configuration_that_is_delivered():
    launched("launched", "two-cpu.yaml")
    assert_alike("launched", "one")


@pytest.mark.slow
def test_two_that_hold_half_of_the_network_each_go_on_where_one_was_killed(monkeypatch):
    """FSDP: network, optimizer and the best network so far are taken up and written whole."""
    killed_after_step_4("halves", monkeypatch)
    launched("halves", "two-cpu-fsdp.yaml")
    assert_gone_on("halves", "FSDP: the editor's network is spread over 2 processes")


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install 'edit-cli[deepspeed]'"
)
def test_two_with_half_of_the_optimizer_each_go_on_where_one_was_killed(monkeypatch):
    """ZeRO: the optimizer's states are taken up and written whole.

    DeepSpeed's first start compiles for a minute or more.
    """
    killed_after_step_4("zero", monkeypatch)
    launched("zero", "two-cpu-deepspeed.yaml")
    assert_gone_on("zero", "DeepSpeed: ZeRO stage 2 over 2 processes")


def test_deepspeed_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    net = nn.Linear(1, 1)
    with pytest.raises(MissingError, match=r"DeepSpeed is not installed: pip install 'edit-cli\[deepspeed\]'"):
        Zero(net, torch.optim.Adam(net.parameters()), 2, 1, 1.0, None)


@pytest.mark.parametrize("file", ["deepspeed.yaml", "two-cpu-deepspeed.yaml"])
def test_the_stage_is_taken_from_what_accelerate_makes_of_a_configuration(file, monkeypatch):
    started: list[Any] = []
    monkeypatch.setattr(launch, "deepspeed_launcher", started.append)
    launch.launch_command(
        launch.launch_command_parser().parse_args(["--config_file", str(CONFIGURATIONS / file), "script.py"])
    )
    assert started[0].num_processes == 2
    with monkeypatch.context() as patch:
        for name, value in prepare_deepspeed_cmd_env(started[0])[1].items():
            patch.setenv(name, value)
        assert stage_of_launcher() == 2 and "ACCELERATE_USE_DEEPSPEED" not in os.environ
        assert stage_of_launcher() == 0


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("ACCELERATE_USE_MEGATRON_LM", "true", "does not work with megatron-lm: launch with conf/accelerate/fsdp.yaml"),
        ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3", "zero_stage=3: give 1 or 2, or launch with conf/accelerate/fsdp.yaml"),
        ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu", "offload_optimizer_device: leave it out"),
        ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "own.json", "deepspeed_config_file: leave it out"),
    ],
)
def test_launchers_that_want_more_than_a_training_is_made_for_are_refused(variable, value, told, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv(variable, value)
    ended = invoke(Path("unused"), *training("refused"))
    assert ended.code == 2 and told in " ".join(ended.err.split())
    assert ended.err.count("error") == 1 and not Path("refused/run").exists()


def stand_in(training: TrainingConfig, shares_cases: bool) -> Any:
    """Of an editor in one of two processes, what a training looks at before it begins."""
    return SimpleNamespace(
        lm=SimpleNamespace(process_group=ProcessGroup(0, 2)),
        config=SimpleNamespace(training=training, cases_per_edit=1, cases_per_evaluation=1),
        shares_cases=shares_cases,
    )


CASE = Case("1", (), ())


@pytest.mark.parametrize("setting", [{"fsdp": True}, {"precision": "fp16"}])
def test_settings_that_do_not_go_with_deepspeed_are_refused(setting):
    editor = stand_in(TrainingConfig(edits=2, **setting), shares_cases=False)
    with pytest.raises(UsageError, match="DeepSpeed does not work with"):
        Training(editor, [CASE] * 2, [CASE], Path("odd"), "stamp", print, 2)


@pytest.mark.parametrize(
    ("shares_cases", "told"),
    [
        (False, "method.training.edits=3 cannot be shared by 2 processes: give a multiple"),
        (True, "method.edits=1 facts cannot be shared by 2 processes: give 2 or more"),
    ],
)
def test_a_batch_that_cannot_be_shared_is_refused(shares_cases, told):
    editor = stand_in(TrainingConfig(edits=3), shares_cases)
    with pytest.raises(UsageError, match=told):
        Training(editor, [CASE] * 3, [CASE], Path("odd"), "stamp", print)
