"""The command that would train the editor of a job: what it says where nothing has been trained yet."""

from __future__ import annotations

import json
import shlex
from typing import Any

from edit_cli.experiment.job import Job
from edit_cli.experiment.settings import Settings

EMBEDDED, OTHERS = "world", "zsre_qa"  # data sets to train on, where the job's own has no splits


def training_command(job: Job) -> str:
    """`edit-cli train-editor method=… model=… dataset=…`, with every setting in which the job's method or model differs
    from the packaged one.
    """
    choices, top, source = job.choices, job.config.settings, job.config.dataset
    dataset = choices.get("dataset")
    if dataset is None or source is None or not source.has_splits:
        dataset = EMBEDDED if job.config.model.records == EMBEDDED else OTHERS
    words = [f"method={choices['method']}", f"model={choices['model']}", f"dataset={dataset}"]
    for group in ("model", "method"):
        words += [f"{group}.{key}={_written(value)}" for key, value in job.composed.departures(group).items()]
    usual = Settings()
    words += [f"{key}={getattr(top, key)}" for key in ("seed", "cache_dir") if getattr(top, key) != getattr(usual, key)]
    words += [f"plugins=[{','.join(job.composed.plugins)}]"] if job.composed.plugins else []
    return shlex.join(["edit-cli", "train-editor", *words])


def _written(value: Any) -> str:
    """As it is typed on a command line."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
