"""What the numbers of a run hang on: its settings, and the conditions that runs must share to stand in one column."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edit_cli.config.build import did_you_mean
from edit_cli.config.identity import flatten
from edit_cli.errors import UsageError
from edit_cli.experiment.run_directory import NO_INFLUENCE, PLACE, SHARED
from edit_cli.runs.format import kind_of
from edit_cli.runs.record import RunRecord

# parts of a protocol that only add figures, or only say what is kept
ADDING = frozenset(
    "batches restored kind every save_edits edits_room checkpoints first holdout held_out collapse_below"
    " collapse_perplexity stop_on_collapse observe.generate observe.sample observe.attribute observe.perplexity".split()
)
DECIDING = ("observe.generate",)  # of them, what decides in `sme` which answers are right
MODEL = ("name", "id", "revision", "dtype", "quantize", "labels", "beams", "perplexity_text")
DATA = ("data set", "record ids", "data file")
# settings of a data set that only say which of its records are taken, or where they lie: DATA tells them
CHOOSING = frozenset("type name path published split ids offset known known_by cache_dir".split())
SIZE = "protocol.batch_size"
JUDGE = "observe.judge."


def conditions(record: RunRecord) -> dict[str, Any]:
    """Model, records and protocol of a run: what numbers have to share to stand in one column."""
    manifest = record.manifest
    config, about = manifest["config"], manifest["dataset"]
    model, data = config.get("model") or {}, config.get("data") or {}
    protocol, dataset = flatten({**protocol_of(manifest), **manifest["protocol"]}), flatten(config.get("dataset") or {})
    adding = ADDING.difference(DECIDING) if kind_of(manifest) == "sme" else ADDING
    if protocol.get(f"{JUDGE}model") is None:  # nobody judges, however that would be done
        protocol = {key: value for key, value in protocol.items() if not key.startswith(JUDGE)}
    if isinstance(protocol.get("batch_size"), int):
        protocol["batch_size"] = min(protocol["batch_size"], max(about["records_selected"], 1))
    return {
        "command": kind_of(manifest),
        "model": manifest["model"],
        **{f"model.{key}": model.get(key) for key in MODEL},
        **dict(zip(DATA, (about["name"], about["ids_sha256"], data.get("sha256")), strict=True)),
        "base_edit": config.get("base_edit"),
        **{
            f"protocol.{key}": value
            for key, value in protocol.items()
            if key not in adding and not _is_seed(key) and key.partition(".")[2] not in NO_INFLUENCE
        },
        **{
            f"dataset.{key}": value
            for key, value in dataset.items()
            if key.partition(".")[0] not in CHOOSING and not _is_seed(key)
        },
    }


def setting(record: RunRecord, key: str) -> Any:
    """The value of a key in the run's configuration.

    Raises:
        UsageError: it has none of that name.
    """
    config = record.manifest["config"]
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            raise UsageError(f"{record.path} has no setting {key}{did_you_mean(key, list(flatten(config)))}")
        value = value[part]
    if key == SIZE and not isinstance(value, int):
        return conditions(record)[SIZE]  # what auto or all came to
    return value


def identity(record: RunRecord) -> dict[str, Any]:
    """The configuration but for seeds, and what moves no result."""
    config = flatten(record.manifest["config"], (*PLACE, *SHARED, "model.device"))
    return {"command": record.manifest["command"], "method": record.manifest["method"]} | {
        key: value for key, value in config.items() if not _is_seed(key) and key.rpartition(".")[2] not in NO_INFLUENCE
    }


def seeds(record: RunRecord) -> dict[str, Any]:
    return {key: value for key, value in flatten(record.manifest["config"], SHARED).items() if _is_seed(key)}


def _is_seed(key: str) -> bool:
    return key.rpartition(".")[2].endswith("seed")


def protocol_of(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    return manifest["config"].get("protocol") or {}
