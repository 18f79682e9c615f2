"""The training loop: resumed trainings, broken ones, and what a step is made of."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from embedded import same_bits
from safetensors.torch import save_file
from stats_helpers import Recorder
from torch import nn

from edit_cli.distributed import SINGLE
from edit_cli.editors.meta.base import TrainableConfig, TrainableEditor, TrainingConfig
from edit_cli.editors.meta.episodes import EpisodeConfig, sample_episodes, spared
from edit_cli.errors import MissingError, UsageError
from edit_cli.requests import Case, EditRequest, Probe
from edit_cli.training.loop import TRAIN, VALIDATION, Training, TrainingFailed, rate
from edit_cli.training.order import Edits


@dataclass(frozen=True, kw_only=True)
class FitConfig(TrainableConfig):
    """trouble: what goes wrong, from step 5 on."""

    trouble: str = ""
    noise: float = 0.1
    size: int = 1

    @property
    def cases_per_edit(self) -> int:
        return self.size


class Fit(TrainableEditor[FitConfig, nn.Module]):
    """Learns a number for each case: its id, with noise."""

    Config = FitConfig

    def __init__(self, *begun) -> None:
        super().__init__(*begun)
        self.seen: list[list[str]] = []

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))

    def loss(self, net, batch):
        self.seen.append([case.id for case in batch])
        inputs = torch.tensor([[int(case.id) / 10, 1.0] for case in batch])
        wanted = inputs[:, :1] + self.config.noise * torch.randn(len(batch), 1)
        loss = (net(inputs) - wanted).square().mean()
        if net.training and self.config.trouble and len(self.seen) > 5:
            loss = loss * (float("nan") if self.config.trouble == "nan" else 0.0)
        return loss, {"shift": 99.0 if self.config.trouble == "shift" else 0.5}

    def edit(self, requests):
        raise NotImplementedError


def fit(trouble: str = "", size: int = 1, noise: float = 0.1, notes: list | None = None, **options) -> Fit:
    given = {
        "steps": 20,
        "edits": 2,
        "lr": 0.02,
        "validate_every": 5,
        "validation_edits": 4,
        "save_every": 4,
        "log_every": 1,
        "trackers": [],
    }
    training = TrainingConfig(**{**given, **options})
    return Fit(FitConfig(trouble=trouble, size=size, noise=noise, training=training), lm(notes))  # type: ignore[arg-type]


def cases(count: int, subjects: int | None = None) -> list[Case]:
    return [Case(str(i), (EditRequest("{} is", f"S{i % (subjects or count)}", "x"),), ()) for i in range(count)]


def lm(notes: list | None = None):
    monitor = Recorder()
    if notes is not None:
        monitor.notes = notes
    head, layout = SimpleNamespace(kind="causal"), SimpleNamespace(refuse_experts=lambda *_: None)
    return SimpleNamespace(
        process_group=SINGLE, monitor=monitor, device=torch.device("cpu"), head=head, layout=layout, name="none"
    )


def run(editor, folder, write=None):
    lines: dict[Any, Any] = {}

    def keep(line):
        assert lines.setdefault((line["step"], line["kind"]), line) == line
        if write is not None:
            write(line)

    done = Training(editor, cases(10), cases(6), folder, "stamp", keep).run()
    return done, lines


class Killed(BaseException):
    pass


@pytest.mark.parametrize("options", [{}, {"optimizer": "rmsprop", "schedule": "cosine", "warmup": 3, "accumulate": 2}])
@pytest.mark.parametrize("at", [3, 10, 14])
def test_a_killed_training_goes_on_to_the_same_curve(tmp_path, options, at):
    whole, expected = run(fit(**options), tmp_path / "whole")
    lines = {}
    notes: list[str] = []

    def kill(line):
        lines[line["step"], line["kind"]] = line
        if line["step"] == at and line["kind"] == TRAIN:
            raise Killed

    with pytest.raises(Killed):
        run(fit(**options), tmp_path / "broken", write=kill)
    saved = sorted(path.name for path in (tmp_path / "broken" / "state").glob("*"))
    assert saved == ([f"step-{at // 4 * 4 - (4 if at % 4 == 0 else 0):08d}"] if at > 4 else [])
    done, later = run(fit(notes=notes, **options), tmp_path / "broken")
    assert {**lines, **later} == expected and all(lines[key] == later[key] for key in lines.keys() & later.keys())
    assert same_bits(done.net.state_dict(), whole.net.state_dict()) and (done.step, done.best) == (
        whole.step,
        whole.best,
    )
    assert bool(notes and "goes on at step" in notes[0]) == (at > 4)
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.pkl"))


def stopped(folder: Path) -> Path:
    """The state of a training that was killed after its tenth step."""

    def kill(line):
        if (line["step"], line["kind"]) == (10, TRAIN):
            raise Killed

    with pytest.raises(Killed):
        run(fit(), folder, write=kill)
    (state,) = (folder / "state").glob("step-*")
    return state


def test_half_of_a_state_counts_for_nothing(tmp_path):
    """A process may be killed while it removes one."""
    whole, _ = run(fit(), tmp_path / "whole")
    state = stopped(tmp_path / "broken")
    (state.parent / "step-00000004").mkdir()
    shutil.copy(state / "network.safetensors", state.parent / "step-00000004")
    notes: list[str] = []
    done, _ = run(fit(notes=notes), tmp_path / "broken")
    assert "goes on at step 8" in notes[0] and same_bits(done.net.state_dict(), whole.net.state_dict())


@pytest.mark.parametrize(
    "damage",
    [
        lambda state, about: about.update(bad=None),
        lambda state, about: about.update(optimizer=[]),
        lambda state, about: about.pop("best_line"),
        lambda state, about: about["optimizer"].update({"99.x": 1}),
        lambda state, about: (state / "network.safetensors").write_bytes(b"x"),
        lambda state, about: (state / "optimizer.safetensors").unlink(),
        lambda state, about: save_file({"other": torch.ones(1)}, state / "network.safetensors"),
        lambda state, about: save_file({"0.exp_avg": torch.ones(7)}, state / "optimizer.safetensors"),
        lambda state, about: save_file({"x.y": torch.ones(())}, state / "optimizer.safetensors"),
    ],
)
def test_a_damaged_state_names_what_to_delete(tmp_path, damage):
    state = stopped(tmp_path)
    about = json.loads((state / "state.json").read_text())
    damage(state, about)
    (state / "state.json").write_text(json.dumps(about))
    with pytest.raises(MissingError, match=f"{state}"):
        run(fit(), tmp_path)
    shutil.rmtree(state)
    run(fit(), tmp_path)


def test_a_state_of_another_training_is_not_taken_up(tmp_path):
    run(fit(steps=8), tmp_path)
    notes: list[str] = []
    lines: list[dict[str, Any]] = []
    Training(fit(steps=8, notes=notes), cases(10), cases(6), tmp_path, "another", lines.append).run()
    assert not any("goes on" in note for note in notes)
    assert [line["step"] for line in lines if line["kind"] == TRAIN] == list(range(1, 9))


def test_the_best_network_is_kept_and_training_stops_early(tmp_path):
    notes: list[str] = []
    done, lines = run(fit(steps=400, lr=0.5, patience=10, noise=1.0, notes=notes), tmp_path)
    losses = {step: line["loss"] for (step, kind), line in lines.items() if kind == VALIDATION}
    assert done.step == min(losses, key=losses.__getitem__) and max(losses) == done.step + 10 < 400
    assert any("stopped at step" in note for note in notes)
    editor = fit(noise=1.0)
    done.net.eval()
    held_out = Edits(cases(6), 1, 0)
    torch.manual_seed(random.Random(f"{VALIDATION}/0").getrandbits(62))
    loss, _ = editor.loss(done.net, [held_out[number][0] for number in range(4)])
    assert done.best["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)


@pytest.mark.parametrize("count", [8, 24])
def test_validation_does_not_depend_on_how_many_edits_a_step_has(tmp_path, count):
    """A learning rate that changes nothing: what is left of a difference would be other draws or batches."""
    losses = set()
    for edits in (1, 2, 5):
        editor = fit(steps=1, lr=1e-30, edits=edits, validation_edits=count)
        lines: list[dict] = []
        Training(editor, cases(10), cases(30), tmp_path / str(edits), "stamp", lines.append).run()
        losses |= {line["loss"] for line in lines if line["kind"] == VALIDATION}
    assert len(losses) == 1


def test_what_must_stay_is_another_fact_where_the_data_name_nothing(tmp_path):
    """Also where a batch holds one case: its own prompt must not stay as it was."""
    own = [replace(case, probes=(Probe("locality", "other", "y"),)) if case.id == "1" else case for case in cases(4)]
    given = spared(own)
    assert [probe.prompt for case in given for probe in case.probes] == ["S1 is", "other", "S3 is", "S0 is"]
    (episode,) = sample_episodes([given[0]], 1, EpisodeConfig())
    assert episode.locality == (("S1 is", "x"),)
    assert spared(cases(1)) == cases(1)
    with pytest.raises(UsageError, match=r"case 0 has no prompt whose answer must stay.*method.draw.locality=\[\]"):
        sample_episodes(cases(1), 1, EpisodeConfig())


def first_fit(order: list[Case], size: int) -> list[list[Case]]:
    """Each case in the first edit that has room and none of its subjects; the rest fills what is left."""
    edits: list[list[Case]] = [[] for _ in range(len(order) // size)]
    spare: list[Case] = []
    for case in order:
        subjects = {request.subject for request in case.requests}
        fits = (
            edit
            for edit in edits
            if len(edit) < size and not subjects & {request.subject for other in edit for request in other.requests}
        )
        next(fits, spare).append(case)
    for edit in edits:
        while len(edit) < size:
            edit.append(spare.pop())
    return edits


@pytest.mark.parametrize(("count", "subjects", "size"), [(40, 40, 7), (60, 9, 6), (50, 3, 5), (30, 1, 4)])
def test_each_case_takes_the_first_place_that_is_right(count, subjects, size):
    found = Edits(mixed := cases(count, subjects), size, 0)
    order = random.Random("0/0").sample(mixed, count)
    assert [found[place] for place in range(count // size)] == first_fit(order, size)
    double = [
        replace(case, requests=(*case.requests, EditRequest("{} was", f"S{int(case.id) % 5}", "x"))) for case in mixed
    ]
    order = random.Random("0/0").sample(double, count)
    found = Edits(double, size, 0)
    assert [found[place] for place in range(count // size)] == first_fit(order, size)


def test_putting_edits_in_order_looks_at_each_case_once(monkeypatch):
    looked = []

    class Counted(EditRequest):
        def __getattribute__(self, name):
            if name == "subject":
                looked.append(name)
            return super().__getattribute__(name)

    many = [Case(str(i), (Counted("{} is", f"S{i % 700}", "x"),), ()) for i in range(2000)]
    looked.clear()
    _ = Edits(many, 100, 0)[0]
    assert len(looked) <= 2 * len(many)


@pytest.mark.parametrize(
    ("trouble", "message"),
    [("nan", "a loss that is no number"), ("zero", "no gradient reached the editor"), ("shift", "grown to 99 times")],
)
def test_a_training_that_cannot_work_is_stopped_with_the_reason(tmp_path, trouble, message):
    with pytest.raises(TrainingFailed, match=message):
        run(fit(trouble, steps=60), tmp_path)


def test_a_single_bad_batch_is_left_out(tmp_path, monkeypatch):
    real = Fit.loss

    def loss(self, net, batch):
        found, told = real(self, net, batch)
        return (found * float("inf") if len(self.seen) == 3 else found), told

    monkeypatch.setattr(Fit, "loss", loss)
    done, lines = run(fit(), tmp_path)
    assert (
        "loss" not in lines[3, TRAIN]
        and torch.isfinite(torch.tensor([line["loss"] for key, line in lines.items() if key[0] > 3])).all()
    )
    assert all(value.isfinite().all() for value in done.net.state_dict().values())


def test_accumulated_micro_batches_are_one_batch(tmp_path):
    wide, _ = run(fit(noise=0.0, edits=4, validate_every=20), tmp_path / "wide")
    small, _ = run(fit(noise=0.0, edits=2, accumulate=2, validate_every=20), tmp_path / "small")
    for name, value in wide.net.state_dict().items():
        torch.testing.assert_close(small.net.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_mixed_precision_trains_too(tmp_path):
    done, lines = run(fit(precision="bf16"), tmp_path)
    assert all(value.dtype == torch.float32 for value in done.net.state_dict().values())
    assert lines[20, VALIDATION]["loss"] < lines[5, VALIDATION]["loss"]


def test_every_epoch_shows_every_case_once_and_no_subject_twice_in_an_edit():
    edits = Edits(cases(20, subjects=10), 5, 0)
    epochs = [[edits[epoch * 4 + place] for place in range(4)] for epoch in range(2)]
    for epoch in epochs:
        assert sorted(int(case.id) for edit in epoch for case in edit) == list(range(20))
        assert all(len({case.requests[0].subject for case in edit}) == 5 for edit in epoch)
    assert epochs[0] != epochs[1] and Edits(cases(20, subjects=10), 5, 0)[7] == epochs[1][3]


def test_learning_rates():
    options = TrainingConfig(steps=10, warmup=2, schedule="linear")
    assert [rate(options, step) for step in (0, 1, 2, 6, 9)] == [0.5, 1.0, 1.0, 0.5, 0.125]
    assert rate(replace(options, schedule="constant"), 9) == 1.0
    assert rate(replace(options, schedule="cosine"), 6) == pytest.approx(0.5)


def test_curves_go_to_trackers_by_name(tmp_path):
    with pytest.raises(UsageError, match="nothing is none that accelerate knows"):
        run(fit(trackers=["nothing"]), tmp_path)
    notes: list[str] = []
    run(fit(steps=2, trackers=["tensorboard"], notes=notes), tmp_path)
    from accelerate.utils import is_tensorboard_available

    if is_tensorboard_available():
        assert list(tmp_path.rglob("events.out.tfevents.*"))
    else:
        assert any("TensorBoard is not installed" in note for note in notes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"schedule": "x"}, "schedule=x"),
        ({"precision": "int1"}, "precision=int1"),
        ({"optimizer": "x"}, "optimizer=x"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        TrainingConfig(**options)


def test_too_few_records_are_refused(tmp_path):
    with pytest.raises(UsageError, match="7 cases make one edit, and the validation split has 6"):
        run(fit(size=7), tmp_path)


def test_a_batch_that_the_split_does_not_fill_is_refused(tmp_path):
    """It would hold an edit twice, and the curves would not show it."""
    with pytest.raises(UsageError, match=r"method.training.edits=4: the training split makes only 3 edits of 3 cases"):
        run(fit(size=3, edits=4), tmp_path)
    _, lines = run(fit(size=3, edits=3, steps=1), tmp_path)
    assert (1, TRAIN) in lines


def test_a_state_is_whole_or_not_there(tmp_path, monkeypatch):
    """A kill while the state is being written leaves the one before it."""
    from edit_cli.training import state as module

    run(fit(steps=4), tmp_path)
    state = module.State(tmp_path, "stamp")
    monkeypatch.setattr(module, "write_json", lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        state.save(8, nn.Linear(1, 1), None)
    assert module.State(tmp_path, "stamp").latest() == 4
    about = json.loads((tmp_path / "state" / "step-00000004" / "state.json").read_text())
    assert about["stamp"] == "stamp" and about["best_step"] == 4
