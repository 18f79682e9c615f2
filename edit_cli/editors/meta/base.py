"""Editors that are trained once a model and then edit in one step: what they add to `Editor`, how they find what they
learned, and what those share that learn from gradients (MEND, MALMEN, KE, ENN).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar

import torch
from annotated_types import Ge
from torch import Tensor, nn

from edit_cli.config.identity import flatten, plain
from edit_cli.config.registry import name_of
from edit_cli.config.schema import (
    Config,
    Count,
    Layers,
    Linked,
    Mark,
    Natural,
    NonNegative,
    Positive,
    Seed,
    Trackers,
    hints,
)
from edit_cli.editors.base import Context, Editor, EditorConfig
from edit_cli.editors.meta import checkpoints
from edit_cli.editors.meta.base_model_cache import BaseModelCache
from edit_cli.editors.meta.episodes import Episode, EpisodeConfig
from edit_cli.editors.meta.factored_gradients import Gradient
from edit_cli.errors import MissingError
from edit_cli.files.paths import expanded
from edit_cli.lm.layout import projections, widths
from edit_cli.lm.model import LM
from edit_cli.requests import Case

Logs = dict[str, float]  # numbers worth showing


class NotInRecipe:
    """Marks a setting that nothing learned depends on: trainings that differ in it alone have the same result."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Config):
    """How an editor is trained."""

    place = "method.training"

    steps: Count = 1000
    """Optimizer steps."""
    edits: Count = 1
    """Independent edits in a micro-batch, run together."""
    accumulate: Count = 1
    """Micro-batches a step."""
    lr: Positive = 1.0e-3
    """Learning rate of all parameters that have none of their own."""
    optimizer: Literal["adam", "rmsprop"] = "adam"
    """rmsprop is the centered one, as in KE."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Of all learning rates."""
    warmup: Natural = 0
    """Steps over which learning rates rise."""
    clip: Annotated[float, Ge(0), Mark.INFINITE] = 100.0
    """Largest norm of a gradient; 0 for any."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Of the training passes; no: that of the model."""
    validate_every: Count = 100
    """Steps between two validations."""
    validation_edits: Count = 200
    """Edits of the validation split, always the same."""
    patience: Natural = 0
    """Steps without a better validation loss after which training stops; 0: never."""
    largest_shift: Positive = 10.0
    """‖ΔW‖/‖W‖ of an edit above which training has run away."""
    save_every: Annotated[Count, NotInRecipe] = 100
    """Steps after which a killed training can go on."""
    log_every: Annotated[Count, NotInRecipe] = 10
    """Steps a point of the curves."""
    seed: Annotated[Seed, Linked("${seed}")] = 0
    """What is drawn at random depends on it."""
    memory_mib: Annotated[Natural, NotInRecipe] = 256
    """To keep what the frozen model says of the training prompts, so that it is computed once; 0: each time."""
    fsdp: Annotated[bool, NotInRecipe] = False
    """Spread network, gradients and optimizer states over the processes (FSDP2), which else hold one copy each."""
    trackers: Annotated[Trackers, NotInRecipe] = field(default_factory=lambda: ["tensorboard"])
    """Names that accelerate knows (tensorboard, wandb, mlflow, …), beside the curves in the run directory."""


@dataclass(frozen=True, kw_only=True)
class TrainableConfig(EditorConfig):
    """Settings of all trained editors."""

    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How it is trained."""
    checkpoint: Annotated[str | None, NotInRecipe] = None
    """Folder of a trained editor, or hub:owner/name[:folder]; null: the one in cache_dir that was trained on this model
    with these settings."""
    trained_on: Annotated[str | None, NotInRecipe, Linked("${oc.select:dataset.name,null}")] = None
    """Data set that it learned from; where there is none of it, that of another data set is taken, and named."""
    cache_dir: Annotated[str, NotInRecipe, Linked("${cache_dir}/editors")] = "~/.cache/edit-cli/editors"
    """Folder in which trained editors are kept."""

    @property
    def cases_per_edit(self) -> int:
        """Cases that a training edits together as one edit."""
        return 1

    @property
    def cases_per_evaluation(self) -> int:
        """Cases that validation takes for one edit."""
        return self.cases_per_edit


def recipe(config: Any) -> dict[str, Any]:
    """Settings that what is learned depends on, as a checkpoint keeps them: all but those marked `NotInRecipe`."""
    cls: Any = type(config)
    marked = {name for name, hint in hints(cls).items() if NotInRecipe in getattr(hint, "__metadata__", ())}
    own = {each.name: getattr(config, each.name) for each in fields(config) if each.name not in marked}
    return {name: recipe(value) if is_dataclass(value) else value for name, value in own.items()}


T = TypeVar("T", bound=TrainableConfig)
N = TypeVar("N", bound=nn.Module)


class TrainableEditor(Editor[T], Generic[T, N]):
    """An editor with a network of its own, which `edit-cli train-editor` trains on the edits of a data set.

    Attributes:
        shares_cases: all processes make each edit together, and share its cases; else each makes whole edits of a
            batch.
        bound_to: what `base` tells of the model, in a word.
        cache: what the unedited model says during a training, for editors that keep it.
    """

    shares_cases: ClassVar[bool] = False
    bound_to: ClassVar[str] = "weights"
    cache: BaseModelCache | None = None

    # --- what a method defines ----------------------------------------------------------------------------------------

    @abstractmethod
    def build(self) -> N:
        """The network as it begins, float32. Its state dict is all that is trained and saved."""

    @abstractmethod
    def loss(self, net: N, batch: Sequence[Case]) -> tuple[Tensor, Logs]:
        """(loss of a batch of cases, numbers worth showing).

        Whatever is sampled comes from torch's seed and the cases' ids, so that a resumed training samples the same.
        Where an editor `shares_cases`, every process of `lm.process_group` gets the same batch; the gradients of their
        losses are averaged, and the numbers are those of the whole batch.

        Args:
            net: the network, in training mode or not.
            batch: `training.edits` times `config.cases_per_edit` cases, fewer at validation.

        Returns:
            The loss, and of the numbers `shift`, the largest ‖ΔW‖/‖W‖, and `loss`, which takes the loss's place in the
            curves where the tensor is a stand-in.
        """

    @classmethod
    def require_training(cls, config: T) -> None:
        """As `require`, of what a training begins from."""

    def groups(self, net: N) -> list[dict[str, Any]]:
        """Parameters with their learning rates, for the optimizer; without `lr`, that of `training`."""
        return [{"params": [parameter for parameter in net.parameters() if parameter.requires_grad]}]

    def after_step(self, net: N) -> None:
        """Put the network right after an optimizer step (multipliers that may not be negative)."""

    def after_validation(self, net: N, metrics: dict[str, Any]) -> None:
        """Take note of a validation, in the network alone, so that a resumed training knows (bounds that tighten)."""

    # --- checkpoints --------------------------------------------------------------------------------------------------

    @classmethod
    def kind(cls, config: T) -> dict[str, Any]:
        """What a checkpoint must agree with to be this method's with these settings, on whatever model."""
        return {"type": name_of(cls), "recipe": flatten(plain(recipe(config)))}

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with to be this editor's on this model."""
        return {**self.kind(self.config), "base": self.base()}

    def base(self) -> str:
        """What of the model a trained network is bound to: all its weights."""
        return self.lm.fingerprint()

    def trained(self) -> N:
        """The trained network for this model, ready to edit.

        Raises:
            MissingError: there is none, and how to train it; or it is damaged or of another model.
        """
        return self.context.once("network", self._load)

    def _load(self) -> N:
        folder = self._folder()
        tensors, about = checkpoints.load(folder)
        own = self.identity()
        if about["type"] != own["type"]:
            raise MissingError(
                f"{folder} was trained as {about['type']}, not as {own['type']}: {_remedy(self.context)}"
            )
        if about["base"] != own["base"]:
            raise MissingError(
                f"{folder} was trained for {about['model']['name']}, and these are other {self.bound_to} than"
                f" {self.lm.name} has: {_remedy(self.context)}"
            )
        net = self.build()
        checkpoints.fill(net, tensors, folder)
        return net.to(self.lm.device).eval().requires_grad_(False)

    def _folder(self) -> Path:
        """Of the checkpoint."""
        if self.config.checkpoint is not None:
            return checkpoints.here(self.config.checkpoint)
        fitting = checkpoints.find(expanded(self.config.cache_dir), self.identity())
        if not fitting:
            raise MissingError(f"this editor has not been trained for {self.lm.name}: {_remedy(self.context)}")
        right = [folder for folder, about in fitting if about["dataset"]["name"] == self.config.trained_on]
        if right:
            return right[0]
        names = list(dict.fromkeys(about["dataset"]["name"] for _, about in fitting))
        if len(names) > 1:
            raise MissingError(
                f"this editor was trained on {', '.join(names)}, and not on {self.config.trained_on}: choose one by"
                " method.trained_on=NAME"
            )
        self.lm.monitor.note(f"the editor was trained on {names[0]}")
        return fitting[0][0]

    @classmethod
    def require(cls, config: T, model: str, context: Context) -> None:
        """A trained network of these settings, for whatever model: whether it is this one's, only its weights tell."""
        if config.checkpoint is not None:
            checkpoints.read_about(checkpoints.here(config.checkpoint))
        elif not checkpoints.find(expanded(config.cache_dir), cls.kind(config)):
            raise MissingError(f"this editor has not been trained for {model}: {_remedy(context)}")

    def warm_up(self) -> None:
        self.trained()


def _remedy(context: Context) -> str:
    command = context.train_command() if context.train_command is not None else "edit-cli train-editor"
    return f"train it by `{command}`, or name another by method.checkpoint=DIR"


# --- editors that learn from gradients -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class GradientConfig(TrainableConfig):
    """Which matrices are edited, and what training asks of an edit."""

    layers: Layers = field(default_factory=list)
    """Blocks whose MLPs are edited; none given: the last ones, as published."""
    last: Count = 3
    """How many of every stack, where no layers are given (published: 3, and 2 of encoder and decoder each)."""
    part: Literal["both", "out", "block"] = "both"
    """Both sides of an MLP, its output projection alone, or every matrix of the block."""
    second_in: bool = True
    """Of gated MLPs, edit the second input matrix too."""
    edit_weight: NonNegative = 1.0
    """Weight of the new answers in the loss."""
    locality_weight: NonNegative = 1.0
    """Weight of the answers that must stay."""
    draw: EpisodeConfig = field(default_factory=EpisodeConfig)
    """What is sampled for each fact."""


G = TypeVar("G", bound=GradientConfig)


class GradientEditor(TrainableEditor[G, N]):
    """An editor that turns the gradients of facts by some weight matrices into changes of these.

    Attributes:
        modules: projections that are edited.
        lowest: the first block that holds one.
    """

    heads: ClassVar[tuple[str, ...]] = ("causal", "seq2seq", "classifier")
    cache: BaseModelCache

    def __init__(self, config: G, lm: LM, context: Context | None = None) -> None:
        super().__init__(config, lm, context)
        config.draw.refuse_unfit(lm)
        self.modules, self.lowest = edited_modules(lm, config)
        self.cache = BaseModelCache(lm, config.training.memory_mib * 2**20)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(d_in, d_out) of each module."""
        return [widths(self.lm.module(name))[::-1] for name in self.modules]

    def support_gradients(self, episodes: Sequence[Episode]) -> dict[str, Gradient]:
        """{module: gradient} of the pairs to be written, one row each; in a training, what was computed once."""
        rows = self.cache.rows([pair for episode in episodes for pair in episode.support])
        return self.cache.gradients(rows, self.modules)


def edited_modules(lm: LM, config: GradientConfig) -> tuple[list[str], int]:
    """(projections that are edited, the lowest of their layers).

    Raises:
        UsageError: a layer that does not exist.
    """
    chosen = sorted(config.layers) or lm.layout.last_layers(config.last)
    if config.part == "block":
        blocks = [lm.layout.block(layer) for layer in chosen]
        return [f"{block}.{name}" for block in blocks for name in projections(lm.module(block))], min(chosen)
    weights = [
        lm.layout.mlp_weights(layer, config.second_in)
        if config.part == "both"
        else (f"{lm.layout.mlp_out(layer)}.weight",)
        for layer in chosen
    ]
    return [name.removesuffix(".weight") for names in weights for name in names], min(chosen)


@dataclass(frozen=True, kw_only=True)
class StepConfig(GradientConfig):
    """A step of learned size on several facts at once."""

    edits: Count = 1
    """Facts edited together; train it for as many."""
    step_size: Positive = 1.0e-4
    """Of each matrix, at first."""
    log_step: bool = False
    """Learn its logarithm, so that it keeps its sign."""
    step_lr: NonNegative = 1.0e-4
    """Learning rate of the step sizes."""

    @property
    def cases_per_edit(self) -> int:
        return self.edits


class StepSizes(nn.Module):
    """A network with a learned step size of each edited module."""

    def __init__(self, count: int, config: StepConfig) -> None:
        super().__init__()
        self.log_step = config.log_step
        first = math.log(config.step_size) if config.log_step else config.step_size
        self.steps = nn.Parameter(torch.full((count,), first))

    @property
    def sizes(self) -> Tensor:
        """(modules,)."""
        return self.steps.exp() if self.log_step else self.steps
