"""What stands at the top of each command's configuration. Imports nothing heavy: help and completion read it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Len

from edit_cli.config.schema import (
    Config,
    Count,
    FilePath,
    Layers,
    Linked,
    Mark,
    Modules,
    Seed,
    Sentence,
    Such,
    Trackers,
)
from edit_cli.errors import UsageError

if TYPE_CHECKING:
    from edit_cli.config.composed import Composed


@dataclass(frozen=True, kw_only=True)
class Settings(Config):
    """What all commands share."""

    limit: Annotated[Count | None, Linked("${model.default_limit}")] = None
    """Records to use at most; null: all of them."""
    seed: Seed = 0
    """Of everything that is drawn at random while editing."""
    tag: str | None = None
    """Added to the name of the run's directory, to keep several side by side."""
    runs_dir: FilePath = "runs"
    """Runs lie at RUNS_DIR/COMMAND/DATASET/MODEL/METHOD[-TAG]."""
    run_dir: FilePath | None = None
    """Where the run lies instead, exactly."""
    overwrite: bool = False
    """Replace the run that lies there instead of continuing it."""
    dry_run: bool = False
    """Say what would be done and what it would cost, and do nothing; --dry-run says the same."""
    processes: Count = 1
    """Processes of this machine that share the work, each with its own GPU where there are any."""
    figures: bool = True
    """Draw the run's figures; without them each run of a large sweep ends a second or two earlier."""
    report: bool = False
    """Write a page to look at, report.html, into the run's directory."""
    trackers: Trackers = field(default_factory=list)
    """Programs that `evaluate` and `sequential` tell their metrics to: tensorboard, wandb, mlflow, trackio, …"""
    plugins: list[str] = field(default_factory=list)
    """Packages of yours that bring methods, data sets or metrics; on the command line only."""
    cache_dir: FilePath = "~/.cache/edit-cli"
    """Where downloads, second moments and trained editors are kept."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The groups that the command works with; others that are composed are only recorded."""
        return "model", "method", "dataset", "protocol"

    def refuse(self, composed: Composed) -> None:
        """Refuse what only the whole configuration tells (UsageError)."""


@dataclass(frozen=True, kw_only=True)
class Fact(Config):
    """One fact to edit."""

    place = "edit"

    prompt: Sentence | None = None
    """The statement up to its answer, with {} for the subject."""
    subject: Sentence | None = None
    """What the fact is about; null: the method must not need one, and the prompt holds no {}."""
    target: Sentence | None = None
    """The new answer."""
    target_true: Sentence | None = None
    """The old answer, to compare with."""
    join: Sentence | None = None
    """What stands between prompt and answer: none, space, or null: what the characters that meet ask for."""

    @property
    def given(self) -> bool:
        """Whether there is one."""
        return self != Fact()

    def check(self) -> None:
        """Raises UsageError for what one fact cannot do without."""
        for key in ("prompt", "target"):
            if getattr(self, key) is None:
                raise UsageError(f"edit.{key} has no value: one fact needs edit.prompt, edit.subject and edit.target")
        if self.subject is None and "{}" in (self.prompt or ""):
            raise UsageError("edit.subject has no value: it belongs where edit.prompt has {}")


@dataclass(frozen=True, kw_only=True)
class EditSettings(Settings):
    """Of `edit`."""

    edit: Fact = field(default_factory=Fact)
    """One fact; without it, those of `dataset`."""
    base_edit: FilePath | None = None
    """Directory of an edit that this one stands on, or hub:owner/name[:folder]."""
    must_take: bool = False
    """Exit code 5 unless every fact took."""

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(part for part in super().parts if part != "dataset" or not self.edit.given)

    def refuse(self, composed: Composed) -> None:
        if self.edit.given:
            self.edit.check()
        elif composed.lacks("dataset.path"):
            raise UsageError(
                "nothing to edit: give one fact (edit.prompt='{} plays the' edit.subject='Jormia Stenenen'"
                " edit.target=organ) or a file of facts (dataset.path=FILE)"
            )


@dataclass(frozen=True, kw_only=True)
class TraceSettings(Settings):
    """Of `trace`."""

    @property
    def parts(self) -> tuple[str, ...]:
        return "model", "dataset", "protocol"


@dataclass(frozen=True, kw_only=True)
class InspectSettings(Settings):
    """Of `inspect`."""

    limit: Count | None = 1000
    """Documents of the text to read at most; null: all of them."""
    edit: FilePath | None = None
    """Directory of a weight edit, or of a run with one: what it changed is told, too."""
    report: bool = True
    """Write a page to look at, report.html, into the run's directory."""

    @property
    def parts(self) -> tuple[str, ...]:
        return "model", "protocol"

    def refuse(self, composed: Composed) -> None:
        if self.processes > 1:
            raise UsageError(f"processes={self.processes}: `inspect` reads its text in one process; leave it out")


@dataclass(frozen=True, kw_only=True)
class Splits(Config):
    """Which records of the data set are trained on, and which tell how well. No subject is in two of them."""

    place = "splits"

    train: str = "train"
    """The split to learn from."""
    validation: str = "validation"
    """The split for early stopping, and to tell which network is kept."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train == self.validation:
            raise UsageError(
                f"splits.validation={self.validation} is what is trained on: name a split of other records"
            )


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(Settings):
    """Of `train-editor`."""

    limit: Count | None = None
    """Records of the training split to use at most; null: all of them."""
    splits: Splits = field(default_factory=Splits)
    """Splits of the data set."""

    @property
    def parts(self) -> tuple[str, ...]:
        return "model", "method", "dataset"


@dataclass(frozen=True, kw_only=True)
class CalibrationSettings(Settings):
    """Of `calibrate`: where keys are read."""

    layers: Annotated[Layers, Len(1)] | None = None
    """Layers to look at; null: all."""
    modules: Annotated[Modules, Len(1)] = field(default_factory=lambda: ["mlp_in", "mlp_out"])
    """Whose keys: mlp_in, mlp_out, or projections' names in a block, such as mlp.c_fc."""
    side: Literal["input", "output"] = "input"
    """Where the key is read: where it enters the module (GRACE) or leaves it (MELO)."""

    @property
    def parts(self) -> tuple[str, ...]:
        return "model", "dataset"


@dataclass(frozen=True, kw_only=True)
class PrepareSettings(Settings):
    """Of `prepare`: what is added to questions and claims, so that trained editors can learn from them."""

    limit: Count | None = None
    """Questions or claims to take; null: all of them."""
    out: FilePath | None = None
    """The new file, JSON lines in KILT's form: for dataset=zsre_qa, of claims for dataset=fever."""
    alternatives: Annotated[int, Ge(2)] = 5
    """Beams of the model: the first is what it says, the others are what an edit may write; of a classifier its
    labels."""
    max_new_tokens: Count = 20
    """Tokens of a beam, and of a reply, at most."""
    templates: Annotated[list[Sentence], Mark.DISTINCT] = field(default_factory=list)
    """Other wordings by rule: texts with a slot {} for the question or claim."""
    there: str | None = None
    """A translation model (encoder-decoder; a name, a folder or an id of the hub) for other wordings by way of another
    language."""
    back: str | None = None
    """The model that translates back."""
    wordings: Count = 4
    """Beams of each of the two: up to so many times so many wordings."""

    @property
    def parts(self) -> tuple[str, ...]:
        return "model", "dataset"

    def __post_init__(self) -> None:
        super().__post_init__()
        for text in self.templates:
            if text.count("{}") != 1:
                raise UsageError(f"templates: {text!r}: give one slot {{}} for the question or claim")
        if (self.there is None) != (self.back is None):
            raise UsageError("there and back: a wording goes through another language and back: name both models")
        if self.run_dir is not None or self.processes > 1:
            key = "run_dir" if self.run_dir is not None else "processes"
            raise UsageError(f"{key}: `prepare` writes one file, by one process; leave it out")

    def refuse(self, composed: Composed) -> None:
        if self.out is None:
            raise UsageError("out has no value: name the new file, such as out=records.jsonl")
        if composed.lacks("dataset.path"):
            raise UsageError(
                "dataset.path has no value: name the file of questions (or choose dataset=fever for claims)"
            )


UNITS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True, kw_only=True)
class TuningSettings(Settings):
    """Of `tune`. Optuna proposes settings, `edit-cli` tries each on the same facts."""

    limit: Count | None = 30
    """Facts that settings are tried on; null: all of them."""
    trials: Count | None = 30
    """Settings to try at most; null: as many as the budget allows."""
    budget: str | None = None
    """Time that the search may take, such as 90s, 20m or 2h, from its first start on; null: as long as it takes."""
    out: FilePath | None = None
    """File for what is found; null: where every run finds it, ~/.config/edit-cli/tuned/METHOD/MODEL.yaml."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trials is None and self.budget is None:
            raise UsageError("trials=null and budget=null: nothing would end the search; give one of them")
        _ = self.seconds

    @property
    def seconds(self) -> float:
        """The budget. Raises UsageError where it is no time."""
        if self.budget is None:
            return float("inf")
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", self.budget)
        if found is None or not float(found[1]):
            raise UsageError(f"budget={self.budget}: give a time, such as 90s, 20m or 2h")
        return float(found[1]) * UNITS[found[2]]

    def refuse(self, composed: Composed) -> None:
        """Settings that are searched need no value; whatever the command line gives is not searched."""
        from edit_cli.tuning.spaces import SPACES

        method = composed.choices["method"]
        if method not in SPACES:
            raise UsageError(f"method={method} cannot be tuned: choose one of {', '.join(sorted(SPACES))}")
        composed.fill("method", {key: values.placeholder() for key, values in SPACES[method].items()})


@dataclass(frozen=True, kw_only=True)
class DoctorSettings(Settings):
    """Of `doctor`."""

    methods: Annotated[list[str], Len(1), Mark.DISTINCT, Such(("rome", "memit"), group="method")] | None = None
    """Methods to try; null: all that there are, but for those that train the model anew."""
    out: FilePath | None = None
    """File for the model's settings, to be kept as DIR/model/NAME.yaml; null: they are shown."""

    @property
    def parts(self) -> tuple[str, ...]:
        return ("model",)


@dataclass(frozen=True, kw_only=True)
class MomentSettings(Settings):
    """Of `precompute-stats`."""

    layers: Annotated[Annotated[Layers, Len(1)] | None, Linked("${oc.select:method.layers,null}")] = None
    """Layers to compute; those that the method uses on this model, if nothing else is said."""

    @property
    def parts(self) -> tuple[str, ...]:
        return "model", "stats"

    def refuse(self, composed: Composed) -> None:
        method = composed.choices["method"]
        if self.run_dir is not None:
            raise UsageError(
                "run_dir: second moments go to the cache, where every run finds them; put that elsewhere by"
                " cache_dir=DIR"
            )
        if composed.is_linked("layers") and not composed.has("method.moments"):
            raise UsageError(f"method={method} needs no second moments: choose another method, or give layers=[3,4]")
        if self.layers is None:
            raise UsageError(
                f"layers has no value, because nothing is published for {method} on this model: give layers=[3,4]"
            )
