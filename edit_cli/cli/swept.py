"""What a command line with several values stands for: its keys, its jobs, what each of them is called."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hydra.errors import HydraException

from edit_cli.config.overrides import RETRY, override_key, unquoted
from edit_cli.experiment.sweep import Sweep

NOT_IN_TAG = ("method", "model", "dataset", "tag", "run_dir", "runs_dir", "hydra")


def sweep_of(command: str, arguments: Sequence[str], argv: Sequence[str], keys: set[str], root: Path) -> Sweep:
    """The sweep that is launched. Raises UsageError: one that was never begun is to be retried."""
    typed = [argument for argument in arguments if argument != RETRY]
    overrides = [argument for argument in argv if "=" in argument and not argument.startswith("-")]
    sweep = Sweep.of(command, typed, overrides, jobs_of(overrides, keys), root)
    return replace(sweep, spared=sweep.retried()) if RETRY in arguments else sweep


def jobs_of(overrides: Sequence[str], keys: set[str]) -> list[list[str]]:
    """What each job of a sweep varies, as Hydra's own sweeper deals them out; nothing where another one does."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    own = [text for text in overrides if not override_key(text).startswith(("hydra.", "hydra/"))]
    if any(override_key(text).startswith(("hydra.sweeper", "hydra/sweeper")) for text in overrides):
        return []
    try:
        batches = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(own), None)
    except HydraException:
        return []  # Hydra will say so, or look into folders for a glob
    return [[text for text in job if override_key(text) in keys] for batch in batches for job in batch]


def swept_keys(overrides: Sequence[str]) -> set[str]:
    """Keys that get several values."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create()
    try:
        parsed = parser.parse_overrides(list(overrides))
    except HydraException:
        return set()  # Hydra will say so
    return {override_key(str(override.input_line)) for override in parsed if override.is_sweep_override()}


def late(override: str, swept: set[str]) -> str:
    """Hydra first composes a sweep without what is swept, where a key of another method is unknown: as one of one
    choice, it waits.
    """
    key = override_key(override)
    if key in swept or "." not in key or key.partition(".")[0] not in swept or override.startswith("~"):
        return override
    name, _, value = override.partition("=")
    return f"{name}=choice({value})"


def tag_of(given: str | None, varied: Sequence[str]) -> str | None:
    """The user's tag and what a sweep varies, apart from what the run directory is named by anyway."""
    parts = [given] if given else []
    for text in varied:
        key = override_key(text)
        if key.partition(".")[0] not in NOT_IN_TAG or ("." in key and not key.startswith("hydra.")):
            value = unquoted(text.partition("=")[2]).strip("[]'\"")
            parts.append(f"{key.rpartition('.')[2]}={value}")
    return re.sub(r"[^\w.=,+-]+", "_", ",".join(parts)) or None
