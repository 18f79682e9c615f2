"""What goes into a command and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import DictConfig

from edit_cli.distributed import ALONE, Team


@dataclass(frozen=True)
class Job:
    """One composed configuration, and what its run directory is called by.

    choices: the option of each group, such as {"method": "memit"}. tag: the user's, or made of what a sweep varies.
    team: the processes that run it. plugins: packages that the command line names.
    """

    command: str
    config: DictConfig
    choices: dict[str, str]
    tag: str | None = None
    in_sweep: bool = False
    team: Team = ALONE
    plugins: tuple[str, ...] = ()

    @property
    def model_name(self) -> str:
        """What the model is called in paths and tables: several are `model=hf`."""
        return str(self.config.model.name)


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
