"""The command that would train the editor of a job: what it says where nothing has been trained yet."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from edit_cli.commands.job import Job
from edit_cli.config import catalog
from edit_cli.config.build import build
from edit_cli.config.identity import flatten
from edit_cli.errors import UsageError

ANYWHERE = ("checkpoint", "trained_on", "cache_dir", "defaults", "_target_")
EMBEDDED, OTHERS = "world", "zsre_qa"  # data sets to train on, where the job's own has no splits


def training_command(job: Job) -> str:
    """`edit-cli train-editor method=… model=… dataset=…`, with every setting in which the job's method differs from
    the packaged one.
    """
    config, name = job.config, job.choices["method"]
    dataset = job.choices.get("dataset")
    if dataset is None or not _has_splits(config.dataset):
        dataset = EMBEDDED if str(config.model.get("records")) == EMBEDDED else OTHERS
    words = [f"method={name}", f"model={job.choices['model']}", f"dataset={dataset}", *_own_model(job)]
    packaged = _packaged(name, job.choices["model"])
    own = _flat(config.method)
    words += [
        f"method.{key}={_written(value)}" for key, value in own.items() if key in packaged and packaged[key] != value
    ]
    words += [
        f"{key}={config[key]}"
        for key, usual in (("seed", 0), ("cache_dir", "~/.cache/edit-cli"))
        if config[key] != usual
    ]
    words += [f"plugins=[{','.join(job.plugins)}]"] if job.plugins else []
    return shlex.join(["edit-cli", "train-editor", *words])


def _own_model(job: Job) -> list[str]:
    """Settings of the model in which it differs from the packaged one: another would be trained for."""
    own = _flat(job.config.model)
    files = [catalog.conf_dir() / "model" / f"{part}.yaml" for part in ("shared/hub", job.choices["model"])]
    packaged = _flat(OmegaConf.merge(*map(OmegaConf.load, filter(Path.is_file, files))))
    return [
        f"model.{key}={_written(value)}"
        for key, value in own.items()
        if key not in ANYWHERE and key in packaged and packaged[key] != value
    ]


def _flat(node: Any) -> dict[str, Any]:
    """{dotted key: value as it is written, interpolations included}"""
    found = OmegaConf.to_container(node, resolve=False)
    return flatten({str(key): value for key, value in found.items()}) if isinstance(found, dict) else {}


def _has_splits(node: DictConfig) -> bool:
    try:
        return build(node).has_splits
    except UsageError:  # a data set without its file
        return False


def _packaged(method: str, model: str) -> dict[str, Any]:
    """{key: value} of the packaged method with what is published for the model, without places; empty for a method
    of the user's own.
    """
    parts = [
        *_with_parents(catalog.conf_dir() / "method" / f"{method}.yaml"),
        catalog.conf_dir() / "tuned" / method / f"{model}.yaml",
    ]
    merged = OmegaConf.merge(*(OmegaConf.load(part) for part in parts if part.is_file()), DictConfig({}))
    found = _flat(merged)
    return {key: value for key, value in found.items() if key not in ANYWHERE}


def _with_parents(file: Path) -> list[Path]:
    """The files that a method's configuration is made of, in order: those that its defaults list names come first."""
    if not file.is_file():
        return []
    names = [name for name in OmegaConf.load(file).get("defaults", []) if isinstance(name, str) and name != "_self_"]
    return [*(found for name in names for found in _with_parents(file.with_name(f"{name}.yaml"))), file]


def _written(value: Any) -> str:
    """As it is typed on a command line."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
