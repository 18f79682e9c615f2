"""What a training does with numbers that are none, with overflows of fp16, and with parameters that no loss uses."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import invoke, json_lines
from embedded import embedded_lm
from learners import statements
from torch import nn
from torch.distributed import HashStore, destroy_process_group, init_process_group
from torch.nn.parallel import DistributedDataParallel

from edit_cli.distributed import ProcessGroup
from edit_cli.editors.base import Method
from edit_cli.editors.meta import base_model_cache, factored_gradients, malmen, mend
from edit_cli.editors.meta.base import TrainingConfig
from edit_cli.editors.meta.episodes import EpisodeConfig
from edit_cli.editors.meta.factored_gradients import Gradient
from edit_cli.editors.meta.hypernetwork import Normalizer
from edit_cli.editors.meta.malmen import MALMEN, MALMENConfig
from edit_cli.editors.meta.mend import MEND, MENDConfig
from edit_cli.errors import RejectedRequest
from edit_cli.training.descent import Descent
from edit_cli.training.loop import Step, Training

OPTIONS = TrainingConfig(
    steps=6, edits=2, lr=1e-3, clip=1.0, validate_every=6, validation_edits=2, trackers=[], memory_mib=0, log_every=1
)
SMALL: dict[str, Any] = {
    "layers": [5],
    "rank": 4,
    "spread": 0.05,
    "draw": EpisodeConfig(outer="any", locality=["random"]),
    "training": OPTIONS,
}
METHODS: dict[str, Method] = {
    "mend": Method(MEND, MENDConfig(**SMALL, step_size=1e-3)),
    "malmen": Method(MALMEN, MALMENConfig(**{**SMALL, "training": replace(OPTIONS, edits=1)}, edits=4, step_size=1e-3)),
}


def poison(monkeypatch, name: str, bad: float, call: int) -> None:
    """Let the given call of `gradients` have one token that is no number."""
    calls, real = [], factored_gradients.gradients

    def gradients(*arguments, **named):
        found = real(*arguments, **named)
        calls.append(arguments)
        if len(calls) != call:
            return found
        outputs = {name: gradient.outputs.clone() for name, gradient in found.items()}
        for gradient, own in zip(found.values(), outputs.values(), strict=True):
            own[tuple(gradient.kept.nonzero()[0])][0] = bad
        return {name: Gradient(one.inputs, outputs[name], one.losses) for name, one in found.items()}

    for module in (base_model_cache, {"mend": mend, "malmen": malmen}[name]):
        monkeypatch.setattr(module, "gradients", gradients)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", METHODS)
def test_a_gradient_that_is_no_number_leaves_no_trace(name, bad, monkeypatch, tmp_path):
    lines: list[dict] = []
    poison(monkeypatch, name, bad, 3)
    editor: Any = METHODS[name].begin(embedded_lm())
    done = Training(editor, statements("train")[:40], statements("validation")[:8], tmp_path, "x", lines.append).run()
    found = {line["step"]: line for line in lines if line["kind"] == "train"}
    assert "loss" not in found[3] and all(found[step]["loss"] > 0 for step in (1, 2, 4, 5, 6))
    assert all(value.isfinite().all() for value in done.net.state_dict().values())
    counts = {float(part.state_dict()["count"]) for part in done.net.modules() if isinstance(part, Normalizer)}
    assert 0 < min(counts) <= max(counts) < 200


@pytest.mark.parametrize("name", METHODS)
def test_an_edit_whose_gradient_is_no_number_is_refused(name, monkeypatch, tmp_path):
    editor: Any = METHODS[name].begin(embedded_lm())
    done = Training(editor, statements("train")[:40], statements("validation")[:8], tmp_path, "x", lambda _: None).run()
    editor.context.kept["network"] = done.net.eval().requires_grad_(False)
    requests = [statements("test")[0].requests[0]]
    assert editor.edit(requests).updates
    poison(monkeypatch, name, float("inf"), 1)
    with pytest.raises(RejectedRequest, match="the gradient of these facts is infinite or no number"):
        editor.edit(requests)


@pytest.fixture
def fp16_accelerator():
    """As on a GPU: accelerate scales losses for fp16, which it refuses to do on a CPU."""
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True)
    accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=2.0**16)
    accelerator.state._mixed_precision = "fp16"
    yield accelerator
    AcceleratorState._reset_state()


def test_a_step_that_overflows_in_fp16_lowers_the_scale_and_the_next_ones_learn(fp16_accelerator):
    net = nn.Linear(1, 1, bias=False)
    descent = Descent(net, torch.optim.SGD(net.parameters(), lr=0.1), 0.0, fp16_accelerator)
    start, scale = float(net.weight), fp16_accelerator.scaler.get_scale()
    for _ in range(2):
        descent.backward(net(torch.full((1, 1), 1e36)).sum())  # times 2 ** 16 more than float32 holds
        assert descent.apply() == float("inf") and float(net.weight) == start
    assert fp16_accelerator.scaler.get_scale() == scale / 4
    descent.backward(net(torch.ones(1, 1)).sum())
    assert descent.apply() == 1.0 and float(net.weight) == pytest.approx(start - 0.1)


class Idle(nn.Module):
    """A network with a part that no loss uses."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(2, 1), nn.Linear(2, 1)


@dataclass
class Uses:
    """An editor of such a network."""

    def loss(self, net, batch):
        return net.used(torch.ones(1, 2)).sum(), {}


def test_processes_do_not_wait_for_parameters_that_no_loss_uses():
    net: Any = Idle()
    step = Step(cast(Any, Uses()), net, nullcontext, averaged=True)
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        averaged = DistributedDataParallel(step)
        for _ in range(2):
            loss, _ = averaged([])
            loss.backward()
    finally:
        destroy_process_group()
    assert net.used.weight.grad.tolist() == [[2.0, 2.0]] and net.idle.weight.grad.tolist() == [[0.0, 0.0]]


class Threads:
    """Processes that are threads: what they exchange goes through a list."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier, self.given = size, threading.Barrier(size), [None] * size

    def exchange(self, rank: int, value):
        self.given[rank] = value
        self.barrier.wait()
        every = list(self.given)
        self.barrier.wait()
        return every


@dataclass(frozen=True)
class Threaded(ProcessGroup):
    meeting: Threads = field(default_factory=lambda: Threads(1))

    def gather(self, mine):
        parts = self.meeting.exchange(self.rank, list(mine))
        return [parts[index % self.size][index // self.size] for index in range(sum(map(len, parts)))]

    def sum(self, tensor):
        return sum(self.meeting.exchange(self.rank, tensor))

    def collect(self, rows):
        return torch.cat(self.meeting.exchange(self.rank, rows))


@pytest.mark.parametrize("asked", [0, 1])
def test_two_processes_make_one_edit_of_malmen_together(asked):
    """Each reads and asks about its share of the facts; averaged, their gradients are those of one process."""
    config, cases = MALMENConfig(**SMALL, edits=5, step_size=1e-3, asked=asked), statements("train")[:5]
    torch.manual_seed(0)
    fresh = MALMEN(config, embedded_lm()).build().state_dict()
    meeting, found = Threads(2), dict[Any, Any]()
    models = {rank: embedded_lm() for rank in (None, 0, 1)}

    def work(rank: int | None) -> None:
        lm = models[rank]
        editor = MALMEN(config, lm)
        net = editor.build()
        net.load_state_dict(fresh)
        if rank is not None:
            lm.process_group = Threaded(rank, 2, meeting)
        stand_in, told = editor.loss(net.train(), cases)
        stand_in.backward()
        gradients = [parameter.grad for parameter in net.parameters()]
        found[rank] = gradients, told, net.hypernetwork.transforms["512x128"].normalizer

    work(None)
    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone, told, statistics = found[None]
    for number, gradient in enumerate(alone):
        averaged = (found[0][0][number] + found[1][0][number]) / 2
        torch.testing.assert_close(averaged, gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))
    for rank in (0, 1):
        assert found[rank][1] == pytest.approx(told, rel=1e-4, abs=1e-7)
        torch.testing.assert_close(found[rank][2].mean, statistics.mean, rtol=1e-4, atol=1e-6)
        assert found[rank][2].count == statistics.count


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        (
            "method=malmen", "method.layers=[5]", "method.rank=4", "method.edits=5", "method.step_size=1.0e-3",
            "method.training.edits=1",
        ),
        (
            "method=serac", "method.scope.model.checkpoint=null", "method.scope.model.family=bert",
            "+method.scope.model.sizes.hidden_size=16", "+method.scope.model.sizes.num_hidden_layers=1",
            "+method.scope.model.sizes.num_attention_heads=2", "method.scope.model.tokenizer=embedded:tiny-gpt2",
            "method.scope.pooling=cls", "method.scope.trained_blocks=null", "method.scope.head=null",
            "method.training.edits=4", "method.training.accumulate=1",
        ),
    ],
)  # fmt: skip
def test_two_processes_train_what_one_edit_or_an_idle_pooler_kept_them_from(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = invoke(
        Path("unused"), "train-editor", "dataset=world", "limit=20", "model.device=cpu", *settings,
        "method.training.steps=3", "method.training.validate_every=3", "method.training.validation_edits=2",
        "method.training.trackers=[]", "method.training.log_every=1", "run_dir=run", "cache_dir=cache", "processes=2",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    losses = [line["loss"] for line in json_lines(Path("run/results.jsonl")) if line["kind"] == "train"]
    assert len(losses) == 3 and all(loss > 0 for loss in losses)
