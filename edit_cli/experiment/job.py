"""What goes into a command and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edit_cli.config.composed import Composed
from edit_cli.distributed import SINGLE, ProcessGroup

if TYPE_CHECKING:
    from edit_cli.datasets import Source
    from edit_cli.editors.base import Method
    from edit_cli.lm.loading import ModelOptions
    from edit_cli.statistics.moments import MomentStore


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run, typed and checked. What its command does without is None.

    settings: the top, as the command's class of settings. plain: everything as dicts and lists, to be written down.
    """

    settings: Any
    model: ModelOptions
    method: Method
    dataset: Source
    protocol: Any
    stats: MomentStore
    plain: dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A run for a command to do, and what its directory is called by. process_group: the processes that do it."""

    composed: Composed
    config: RunConfig
    process_group: ProcessGroup = SINGLE

    @property
    def command(self) -> str:
        return self.composed.command

    @property
    def choices(self) -> dict[str, str]:
        """The option of each group, such as {"method": "memit"}."""
        return self.composed.choices

    @property
    def tag(self) -> str | None:
        return self.composed.tag

    @property
    def in_sweep(self) -> bool:
        return self.composed.in_sweep

    @property
    def model_name(self) -> str:
        """What the model is called in paths and tables: several are `model=hf`."""
        return self.config.model.name

    @property
    def about_method(self) -> dict[str, Any]:
        """What saved edits say of their method, and of the chats that it may have been given facts in."""
        protocol = self.config.protocol
        return {
            "name": self.choices["method"],
            **self.config.plain["method"],
            **({} if protocol.chat == "none" else {"chat": protocol.as_made}),
        }


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    `run_dir` is where its results lie, if it came so far; `number` and `overrides` place it in a sweep.
    """

    exit_code: int = 0
    run_dir: str | None = None
    number: int = 0
    overrides: tuple[str, ...] = ()
    error: str | None = None
