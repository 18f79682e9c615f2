"""The loop that trains editors, the same for all of them.

Killed at any moment, the same training goes on to the same curve.

Every step is a pure function of what was saved before it: which cases it sees and what is sampled from them depends on
the seed and on the number of the step, the learning rate on that number alone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edit_cli.editors.meta.base import TrainableConfig, TrainableEditor, TrainingConfig
from edit_cli.editors.meta.episodes import spared
from edit_cli.errors import EditCliError, UsageError
from edit_cli.requests import Case
from edit_cli.training.accelerators import accelerated
from edit_cli.training.descent import Descent
from edit_cli.training.order import Edits
from edit_cli.training.sharding import gathered, is_spread, spread_out
from edit_cli.training.state import State
from edit_cli.training.zero import Zero
from edit_cli.wording import many

TRAIN, VALIDATION = "train", "validation"
KEY = ("step", "kind")  # what tells lines of a training's results.jsonl apart
VALIDATION_CASES = 10  # in a batch, whatever `training.edits` is: what is sampled must not depend on it
BAD_SHARE, BAD_AT_LEAST = 0.01, 3  # of micro-batches without a finite loss: more than these end the training
ZERO_STEPS = 5  # steps without any gradient, likewise

Line = dict[str, Any]


class TrainingFailed(EditCliError):
    """Training cannot come to anything; says why, and which setting to change."""

    exit_code = 1


class Step(nn.Module):
    """One micro-batch in one `forward`, so that gradients of several processes are averaged.

    The frozen model is no part of it. averaged: by DDP, which waits for a gradient of every parameter, also of those
    that the loss does not use (the pooler of an encoder whose pooled state nobody reads).
    """

    def __init__(
        self,
        editor: TrainableEditor[Any, Any],
        net: nn.Module,
        autocast: Callable[[], AbstractContextManager],
        averaged: bool = False,
    ) -> None:
        super().__init__()
        self.net, self.editor, self.autocast, self.averaged = net, editor, autocast, averaged

    def forward(self, batch: Sequence[Case]) -> tuple[Tensor, dict[str, float]]:
        with self.autocast():
            loss, logs = self.editor.loss(self.net, batch)
        return (loss + nothing(self.net) if self.averaged else loss), logs


def nothing(net: nn.Module) -> Tensor:
    """0, with every trained parameter in its graph."""
    return 0.0 * sum((parameter.sum() for parameter in net.parameters() if parameter.requires_grad), torch.zeros(()))


@dataclass(frozen=True)
class Trained:
    """net: with the best parameters of the training. step: at which they were found.

    best: numbers of the validation there.
    """

    net: nn.Module
    step: int
    best: Line


def refuse_too_few(config: TrainableConfig, cases: int, validation: int) -> None:
    """Refuse splits of so many cases, if they hold no edit, or fewer than go into one micro-batch, which would then
    hold some of them twice.

    Raises:
        UsageError: names the key.
    """
    per_edit, edits = config.cases_per_edit, config.training.edits
    for name, count, size in (("training", cases, per_edit), ("validation", validation, config.cases_per_evaluation)):
        if count < size:
            raise UsageError(
                f"{size} cases make one edit, and the {name} split has {count}: give more records, or lower what makes"
                " up an edit (method.edits, or method.others)"
            )
    if edits > (there := cases // per_edit):
        each = "" if per_edit == 1 else f" of {per_edit:,} cases each"
        raise UsageError(
            f"method.training.edits={edits}: the training split makes only {many(there, 'edit')}{each}: give"
            f" method.training.edits={there} or less, or more records (limit)"
        )


@dataclass
class Training:
    """One training at work: of the editor's network on `cases`. The state of an earlier start of this training in
    `folder` is taken up.

    stamp: tells this training from another one in the same folder. write: takes the lines of the curves; on going on,
    some come again. zero: stage of DeepSpeed's ZeRO for several processes; 0 for none.

    Raises:
        UsageError: settings that do not fit.
    """

    editor: TrainableEditor[Any, Any]
    cases: Sequence[Case]
    validation: Sequence[Case]
    folder: Path
    stamp: str
    write: Callable[[Line], None]
    zero: int = 0

    def __post_init__(self) -> None:
        editor, lm = self.editor, self.editor.lm
        self.lm, self.config = lm, editor.config.training
        per_edit, per_evaluation = editor.config.cases_per_edit, editor.config.cases_per_evaluation
        refuse_too_few(editor.config, len(self.cases), len(self.validation))
        self._refuse_unshared()
        self.zero = self.zero if lm.process_group.size > 1 else 0
        if self.zero and (self.config.fsdp or self.config.precision == "fp16"):
            raise UsageError(
                "DeepSpeed does not work with method.training.fsdp=true and method.training.precision=fp16: use false,"
                " and bf16 or no"
            )
        self.edits = Edits(spared(self.cases), per_edit, self.config.seed)
        held_out = Edits(spared(self.validation), per_evaluation, self.config.seed)
        self.held_out = [held_out[i] for i in range(min(held_out.per_epoch, self.config.validation_edits))]
        torch.manual_seed(self.config.seed)
        self.net = editor.build().to(lm.device)
        self.state = State(self.folder, self.stamp, lm.process_group.rank)
        self.zero_steps, self.bad = 0, 0

    def _refuse_unshared(self) -> None:
        """Every process must have a part in each batch: some of its edits, or of an edit's cases.

        Raises:
            UsageError: it would not.
        """
        size, edits, cases = self.lm.process_group.size, self.config.edits, self.editor.config.cases_per_edit
        if self.editor.shares_cases and cases < size:
            raise UsageError(f"method.edits={cases} facts cannot be shared by {size} processes: give {size} or more")
        if not self.editor.shares_cases and edits % size:
            raise UsageError(f"method.training.edits={edits} cannot be shared by {size} processes: give a multiple")

    def run(self) -> Trained:
        """All steps that are left.

        Raises:
            TrainingFailed: losses that are no numbers, no gradient, or edits that grow without bounds.
        """
        config = self.config
        with accelerated(self.lm, config, self.folder) as accelerator:
            self._prepare(accelerator)
            done = self._take_up()
            accelerator.log({}, step=done)
            with self.lm.monitor.task("training", config.steps) as advance, self.lm.monitor.phase("train"):
                advance(done)
                while done < config.steps and not self._is_stale(done):
                    line = self._step(done)
                    done += 1
                    if done % config.log_every == 0 or done == 1:
                        self._tell(
                            accelerator, {"step": done, "kind": TRAIN, **_mean(self.lm.process_group.gather([line]))}
                        )
                    if done % config.validate_every == 0 or done == config.steps:
                        self._validate(accelerator, done)
                    if done % config.save_every == 0:
                        self._save(done)
                    advance(1)
            if self._is_stale(done):
                self.lm.monitor.note(
                    f"stopped at step {done:,}: no better validation loss for {many(config.patience, 'step')}"
                )
            self._save(done)
            self.lm.process_group.gather([done])  # nobody is writing any more
            accelerator.end_training()
        net = self.editor.build().to(self.lm.device) if any(map(is_spread, self.net.parameters())) else self.net
        if self.state.best is not None:
            net.load_state_dict(self.state.best)
        return Trained(net, self.state.best_step, self.state.best_line)

    def _prepare(self, accelerator: Any) -> None:
        several = self.lm.process_group.size > 1
        averaged = several and not self.config.fsdp and not self.zero
        self.accelerator = accelerator
        self.step: Any = Step(self.editor, self.net, accelerator.autocast, averaged)
        self.optimizer: Any = None
        self.learns = any(parameter.requires_grad for parameter in self.net.parameters())
        if not self.learns:  # a control: nothing but statistics
            return
        if self.config.fsdp and several:
            spread_out(self.step, self.lm.device)
            self.lm.monitor.note(f"FSDP: the editor's network is spread over {self.lm.process_group.size} processes")
        groups = [{**group, "lr": group.get("lr", self.config.lr)} for group in self.editor.groups(self.net)]
        groups = [{**group, "params": [p for p in group["params"] if p.requires_grad]} for group in groups]
        groups = [group for group in groups if group["params"]]
        kind = torch.optim.Adam if self.config.optimizer == "adam" else _centred_rmsprop
        self.rates = [group["lr"] for group in groups]
        self.descent: Descent | Zero
        if self.zero:
            self.descent = Zero(
                self.step, kind(groups), self.zero, self.config.accumulate, self.config.clip, accelerator
            )
            self.lm.monitor.note(f"DeepSpeed: ZeRO stage {self.zero} over {self.lm.process_group.size} processes")
        else:
            self.descent = Descent(self.step, kind(groups), self.config.clip, accelerator)
        self.step, self.optimizer = self.descent.step, self.descent.optimizer

    def _take_up(self) -> int:
        step = self.lm.process_group.broadcast(self.state.latest())
        if step:
            self.state.load(step, self.net, self.optimizer, self.accelerator.scaler)
            self.state.load_cache(step, self.editor.cache)
            self.bad = self.state.bad
            self.lm.monitor.note(f"training goes on at step {step:,} of {self.config.steps:,}")
        return step

    def _save(self, step: int) -> None:
        self.state.bad = self.bad
        self.state.save_cache(step, self.editor.cache)
        self.state.save(step, self.net, self.optimizer, self.accelerator.scaler)

    def _is_stale(self, step: int) -> bool:
        return bool(self.config.patience) and step - self.state.best_step >= self.config.patience

    # --- a step -------------------------------------------------------------------------------------------------------

    def _step(self, done: int) -> Line:
        """Micro-batches, then one step of the optimizer. done: steps before this one.

        A micro-batch whose loss is no number leaves no trace, not even in the network's running statistics.
        """
        config, logs = self.config, []
        self.net.train()
        for micro in range(config.accumulate):
            number = done * config.accumulate + micro
            with self.accelerator.accumulate(self.step):
                before = [(buffer, buffer.clone()) for buffer in self.net.buffers() if buffer.is_floating_point()]
                loss, line = self._forward(
                    [self.edits[number * config.edits + i] for i in range(config.edits)], f"{config.seed}/{number}"
                )
                finite = bool(self.lm.process_group.sum(torch.tensor(float(not loss.isfinite()))) == 0)
                if not finite:
                    self._refuse_bad(number + 1)
                    for buffer, value in before:
                        buffer.copy_(value)
                    loss, line = nothing(self.net), {}
                logs.append(line)
                if self.optimizer is not None:
                    self.descent.backward(loss)
                    if self.accelerator.sync_gradients:
                        norm = self._apply(done, any(logs))
                        if any(logs):
                            logs[-1]["gradient"] = norm
        return _mean([line for line in logs if line])

    def _forward(self, edits: Sequence[list[Case]], seed: str) -> tuple[Tensor, Line]:
        torch.manual_seed(random.Random(seed).getrandbits(62))
        loss, logs = self.step([case for edit in self._share(edits) for case in edit])
        return loss, {"loss": float(loss.detach()), **logs}

    def _share(self, parts: Sequence[Any]) -> Sequence[Any]:
        """This process's part of a batch: all of it, where each edit is made by all processes together."""
        return parts if self.editor.shares_cases else self.lm.process_group.share(parts)

    def _apply(self, done: int, any_loss: bool) -> float:
        """A step of the optimizer; the norm of the gradient. any_loss: whether a micro-batch had a finite one."""
        config = self.config
        factor = rate(config, done)
        for group, base in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = base * factor
        norm = self.descent.apply()
        if any_loss:
            self.zero_steps = self.zero_steps + 1 if norm == 0 else 0
        if self.zero_steps == ZERO_STEPS:
            raise TrainingFailed(
                f"no gradient reached the editor in {ZERO_STEPS} steps: its edits do nothing to the answers; raise"
                " method.step_size or choose other method.layers"
            )
        if math.isfinite(norm):
            self.editor.after_step(self.net)
        return norm

    def _refuse_bad(self, number: int) -> None:
        self.bad += 1
        if self.bad >= BAD_AT_LEAST and self.bad > BAD_SHARE * number:
            raise TrainingFailed(
                f"{self.bad} of {number:,} batches had a loss that is no number: lower method.training.lr or"
                " method.step_size, or use method.training.precision=no"
            )

    # --- validation ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _validate(self, accelerator: Any, step: int) -> None:
        """The same edits with the same samples every time, whatever `training.edits` is, so that losses can be
        compared.
        """
        config, mine = self.config, []
        self.net.eval()
        chunk = max(1, VALIDATION_CASES // self.editor.config.cases_per_evaluation)
        batches = [self.held_out[first : first + chunk] for first in range(0, len(self.held_out), chunk)]
        with self.lm.monitor.phase("validate"), gathered(self.step):
            for number, batch in self._share(list(enumerate(batches))):
                torch.manual_seed(random.Random(f"{VALIDATION}/{number}").getrandbits(62))
                loss, logs = self.editor.loss(self.net, [case for edit in batch for case in edit])
                mine.append(({"loss": float(loss), **logs}, len(batch)))
        line = _mean(*zip(*(mine if self.editor.shares_cases else self.lm.process_group.gather(mine)), strict=True))
        self._tell(accelerator, {"step": step, "kind": VALIDATION, **line})
        self.lm.monitor.note(f"step {step:,}: {told_of(line)}")
        if not math.isfinite(line["loss"]):
            raise TrainingFailed(
                f"the validation loss at step {step:,} is no number: lower method.training.lr or method.step_size"
            )
        if line.get("shift", 0.0) > config.largest_shift:
            raise TrainingFailed(
                f"edits have grown to {line['shift']:.3g} times the size of the weights at step {step:,}"
                f" (method.training.largest_shift={config.largest_shift:g}): lower method.step_size,"
                " method.training.lr or the learning rate of the step sizes"
            )
        self.state.offer(step, line, self.net)
        self.editor.after_validation(self.net, line)

    def _tell(self, accelerator: Any, line: Line) -> None:
        self.write({name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in line.items()})
        values = {f"{line['kind']}/{name}": value for name, value in line.items() if isinstance(value, float)}
        accelerator.log(values, step=line["step"])


def told_of(line: Line) -> str:
    """The numbers of a line in words."""
    return ", ".join(f"{name} {value:.4g}" for name, value in line.items() if isinstance(value, float))


def rate(config: TrainingConfig, done: int) -> float:
    """What the learning rates are multiplied by after `done` steps."""
    if done < config.warmup:
        return (done + 1) / config.warmup
    share = (done - config.warmup) / max(config.steps - config.warmup, 1)
    return {"constant": 1.0, "linear": 1.0 - share, "cosine": 0.5 + 0.5 * math.cos(math.pi * share)}[config.schedule]


def _centred_rmsprop(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(groups, centered=True)


def _mean(lines: Sequence[Line], weights: Sequence[float] | None = None) -> Line:
    """Weighted means by name, over the lines that have the name; `shift` is the largest."""
    weights, found = weights or [1.0] * len(lines), {}
    for name in dict.fromkeys(name for line in lines for name in line):
        pairs = [(line[name], weight) for line, weight in zip(lines, weights, strict=True) if name in line]
        mean = math.fsum(value * weight for value, weight in pairs) / math.fsum(weight for _, weight in pairs)
        found[name] = max(value for value, _ in pairs) if name == "shift" else mean
    return found
