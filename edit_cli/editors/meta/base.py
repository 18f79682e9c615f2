"""Editors that are trained once a model and then edit in one step: what they add to `Editor`, and how they find what
they learnt.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from edit_cli.config.identity import flatten, plain
from edit_cli.config.registry import name_of
from edit_cli.editors.meta import checkpoints
from edit_cli.editors.meta.base_model_cache import Memory
from edit_cli.editors.old import Editor
from edit_cli.errors import MissingError, UsageError
from edit_cli.files.paths import expanded
from edit_cli.lm.model import LM
from edit_cli.requests import Case

SCHEDULES = ("constant", "linear", "cosine")
PRECISIONS = ("no", "bf16", "fp16")
OPTIMISERS = ("adam", "rmsprop")


@dataclass
class TrainingOptions:
    """How an editor is trained: keys of `method.training`.

    steps: optimiser steps. edits: independent edits in a micro-batch, run together. accumulate: micro-batches a step.
    lr: of what the editor gives no other one. optimiser: adam, or rmsprop (centred, as KE). schedule, warmup: of all
    learning rates.
    clip: largest gradient norm. precision: no, bf16 or fp16, of the training passes.
    validate_every: steps; validation_edits: of the validation split, always the same. patience: steps without a better
    validation loss after which it stops; 0 for never. largest_shift: ‖ΔW‖/‖W‖ of an edit above which training has run
    away.
    save_every: steps after which it can go on when killed. log_every: steps a point of the curves.
    memory_mib: of what the frozen model says of the training prompts, kept so that it is computed once; 0: nothing.
    fsdp: spread network, gradients and optimiser states over the processes (FSDP2), which else hold one copy each.
    trackers: names that accelerate knows (tensorboard, wandb, mlflow, …), beside the curves in the run directory.
    """

    steps: int = 1000
    edits: int = 1
    accumulate: int = 1
    lr: float = 1.0e-3
    optimiser: str = "adam"
    schedule: str = "constant"
    warmup: int = 0
    clip: float = 100.0
    precision: str = "no"
    validate_every: int = 100
    validation_edits: int = 200
    patience: int = 0
    largest_shift: float = 10.0
    save_every: int = 100
    log_every: int = 10
    seed: int = 0
    memory_mib: int = 256
    fsdp: bool = False
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])

    def __post_init__(self) -> None:
        for name in ("steps", "edits", "accumulate", "validate_every", "validation_edits", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"method.training.{name}={getattr(self, name)}: give a number from 1 up")
        for name in ("warmup", "clip", "patience", "memory_mib"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"method.training.{name}={getattr(self, name)}: give a number from 0 up")
        for name in ("lr", "largest_shift"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"method.training.{name}={getattr(self, name)}: give a number above 0")
        for name, known in (("schedule", SCHEDULES), ("precision", PRECISIONS), ("optimiser", OPTIMISERS)):
            if getattr(self, name) not in known:
                raise UsageError(
                    f"method.training.{name}={getattr(self, name)}: choose {', '.join(known[:-1])} or {known[-1]}"
                )


@dataclass(kw_only=True)
class TrainableEditor(Editor):
    """An editor with a network of its own, which `edit-cli train-editor` trains on the edits of a data set.

    checkpoint: directory of a trained network; null: the one in `cache_dir` that was trained on this model with these
    settings.
    trained_on: the data set that it learnt from; where there is none of it, that of another data set is taken, and
    named.
    """

    NO_RECIPE: ClassVar[tuple[str, ...]] = (  # settings that nothing learnt depends on
        "checkpoint", "trained_on", "cache_dir", "training.memory_mib", "training.fsdp", "training.trackers",
        "training.save_every", "training.log_every"
    )  # fmt: skip

    # all processes make each edit together, and share its cases; else each makes whole edits of a batch
    shares_cases: ClassVar[bool] = False
    # settings that came later, each with the value that means what was there before: with it an older training is found
    LATER: ClassVar[dict[str, Any]] = {"draw.stays": "answer"}
    bound_to: ClassVar[str] = "weights"  # what `base` tells of the model
    remembers: ClassVar[bool] = False  # keeps what the unedited model says during a training

    checkpoint: str | None = None
    trained_on: str | None = None
    cache_dir: str = "~/.cache/edit-cli/editors"
    training: TrainingOptions = field(default_factory=TrainingOptions)

    def __post_init__(self) -> None:
        if isinstance(self.training, dict):  # of an edit that was saved
            self.training = TrainingOptions(**self.training)

    def fits(self, lm: LM) -> None:
        super().fits(lm)
        if hasattr(self, "draw"):
            self.draw.fits(lm)

    # --- what a method defines ----------------------------------------------------------------------------------------

    @abstractmethod
    def build(self, lm: LM) -> nn.Module:
        """The network as it begins, float32. Its state dict is all that is trained and saved."""

    @abstractmethod
    def loss(self, net: nn.Module, lm: LM, batch: Sequence[Case]) -> tuple[Tensor, dict[str, float]]:
        """(loss of a batch of cases, numbers worth showing).

        `training.edits` times `cases_per_edit` cases, fewer at validation.

        Whatever is drawn at random comes from torch's seed and the cases' ids, so that a resumed training draws the
        same. Where an editor `shares_cases`, every process of `lm.team` gets the same batch; the gradients of their
        losses are averaged, and the numbers are those of the whole batch.

        Of the numbers, `shift` is the largest ‖ΔW‖/‖W‖, and `loss` takes the loss's place in the curves where the
        tensor is a stand-in.
        """

    def require_training(self) -> None:
        """As `require`, of what a training begins from."""

    @property
    def cases_per_edit(self) -> int:
        """Cases that are edited together as one edit."""
        return 1

    @property
    def cases_per_trial(self) -> int:
        """Cases that validation takes for one edit."""
        return self.cases_per_edit

    def groups(self, net: nn.Module) -> list[dict[str, Any]]:
        """Parameters with their learning rates, for the optimiser; without `lr`, that of `training`."""
        return [{"params": [parameter for parameter in net.parameters() if parameter.requires_grad]}]

    def after_step(self, net: nn.Module) -> None:
        """Put the network right after an optimiser step (multipliers that may not be negative)."""

    def after_validation(self, net: nn.Module, found: dict[str, Any]) -> None:
        """Take note of what validation found, in the network alone, so that a resumed training knows it (bounds that
        tighten).
        """

    def memory(self, lm: LM) -> Memory | None:
        """What the unedited model has said of training prompts, for editors that keep it (`remembers`)."""
        return (
            self.scratch(lm).setdefault("memory", Memory(self.training.memory_mib * 2**20)) if self.remembers else None
        )

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def recipe(self) -> dict[str, Any]:
        """All settings that what is learnt depends on, JSON-able."""
        found = flatten(plain(asdict(self)), self.NO_RECIPE)
        return {name: value for name, value in found.items() if name not in self.LATER or self.LATER[name] != value}

    def identity(self, lm: LM) -> dict[str, Any]:
        """What a checkpoint must agree with to be this editor's on this model."""
        return {**self._settings(), "base": self.base(lm)}

    def _settings(self) -> dict[str, Any]:
        return {"type": name_of(type(self)), "recipe": self.recipe()}

    def base(self, lm: LM) -> str:
        """What of the model a trained network is bound to: all its weights."""
        return lm.fingerprint()

    def trained(self, lm: LM) -> nn.Module:
        """The trained network for this model, ready to edit.

        Raises:
            MissingError: there is none, and how to train it; or it is damaged or of another model.
        """
        memory = self.scratch(lm)
        if "network" not in memory:
            place = self._place(lm)
            tensors, about = checkpoints.load(place)
            own = self.identity(lm)
            if about["type"] != own["type"]:
                raise MissingError(f"{place} was trained as {about['type']}, not as {own['type']}: {self._remedy()}")
            if about["base"] != own["base"]:
                raise MissingError(
                    f"{place} was trained for {about['model']['name']}, and these are other {self.bound_to} than"
                    f" {lm.name} has: {self._remedy()}"
                )
            net = self.build(lm)
            checkpoints.fill(net, tensors, place)
            memory["network"] = net.to(lm.device).eval().requires_grad_(False)
        return memory["network"]

    def _place(self, lm: LM) -> Path:
        if self.checkpoint is not None:
            return expanded(self.checkpoint)
        found = checkpoints.find(expanded(self.cache_dir), self.identity(lm))
        if not found:
            raise MissingError(f"this editor has not been trained for {lm.name}: {self._remedy()}")
        right = [place for place, about in found if about["dataset"]["name"] == self.trained_on]
        if right:
            return right[0]
        names = list(dict.fromkeys(about["dataset"]["name"] for _, about in found))
        if len(names) > 1:
            raise MissingError(
                f"this editor was trained on {', '.join(names)}, and not on {self.trained_on}: choose one by"
                " method.trained_on=NAME"
            )
        place, about = found[0]
        lm.monitor.note(f"the editor was trained on {about['dataset']['name']}")
        return place

    def _remedy(self) -> str:
        return (
            f"train it by `{self.__dict__.get('train_command') or 'edit-cli train-editor'}`, or name another by"
            " method.checkpoint=DIR"
        )

    def require(self, model: str) -> None:
        """A trained network of these settings, for whatever model: whether it is this one's, only its weights tell."""
        if self.checkpoint is not None:
            checkpoints.read_about(expanded(self.checkpoint))
        elif not checkpoints.find(expanded(self.cache_dir), self._settings()):
            raise MissingError(f"this editor has not been trained for {model}: {self._remedy()}")

    def warm_up(self, lm: LM) -> None:
        self.trained(lm)
