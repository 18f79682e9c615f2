"""Runs, edits and checkpoints that were tampered with, merged or torn: one line, exit code 3, whatever was done.

Every variant is a file that was right before one thing in it was changed. What a field may hold is said beside it; it
is given all that it may not.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from importlib import import_module
from inspect import isabstract
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import pytest
import torch
from conftest import Ended, invoke, json_lines
from embedded import embedded_lm, prepared
from safetensors.torch import load_file, save_file
from torch import nn

from edit_cli.editors.locate.memit import MEMIT
from edit_cli.editors.locate.ultraedit import UltraEdit
from edit_cli.editors.memory.base import MemoryPatch
from edit_cli.editors.memory.defer import DeferPatch
from edit_cli.editors.memory.grace import GracePatch
from edit_cli.editors.memory.melo import MeloPatch
from edit_cli.editors.memory.side_memory import WisePatch, mask_of
from edit_cli.editors.memory.tpatcher import NeuronPatch
from edit_cli.editors.meta import checkpoints
from edit_cli.editors.retrieval.base import Fact
from edit_cli.editors.retrieval.ike import IkeRoute
from edit_cli.editors.retrieval.lookup import CacheRoute
from edit_cli.edits import store as edit_store
from edit_cli.edits.edit import Edit, Factors, WeightDelta, WeightState
from edit_cli.errors import EditCliError, MissingError
from edit_cli.experiment import saved_edits
from edit_cli.lm.embeddings import EmbeddingOptions
from edit_cli.lm.model import LM
from edit_cli.report.learning import summary_of
from edit_cli.requests import EditRequest
from edit_cli.runs.run import Run

pytestmark = pytest.mark.thin(8)

DEEP = 200_000
ABSENT = object()
SAMPLES: dict[str, Any] = {
    "null": None, "text": "x", "number": 0.5, "negative": -1, "flag": True, "list": [{}], "object": {"x": []},
}  # fmt: skip
SMALL = ("protocol.observe.sample=false", "protocol.observe.max_new_tokens=3")
FEW = ("protocol.observe.generate=false", "protocol.observe.perplexity=false", "method.steps=1")
COMMANDS = {
    "evaluated": ("evaluate", "method=ft", "limit=2", *FEW),
    "edited": ("edit", "method=ft", "edit.prompt={} is", "edit.subject=Ada", "edit.target=old", *FEW),
    "lifelong": ("sequential", "method=ft", "limit=2", "protocol.batch_size=1", "protocol.holdout=1", *FEW),
    "sme": (
        "sequential", "protocol=sme", "method=ft", "limit=2", "protocol.folds=1", "protocol.train=1", "protocol.test=1",
        *FEW[::2],
    ),
    "traced": ("trace", "limit=2", "protocol.copies=1", "protocol.kinds=[mlp]"),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache_dir) -> Path:
    """A finished run of every kind."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, arguments in COMMANDS.items():
            small = SMALL if arguments[0] != "trace" else ()
            ended = invoke(cache_dir, *arguments, f"run_dir={name}", "model.device=cpu", "figures=false", *small)
            assert ended.code == 0, ended.err
        about = {"name": "d", "source": "s", "records_total": 1, "records_dropped": 0, "records_selected": 1,
                 "limit": None, "split": None, "ids_sha256": ""}  # fmt: skip
        details = {"method": "mend", "model": "m", "dataset": about, "protocol": {"cases": 1}, "seeds": {}}
        key = ("step", "kind")
        with Run.open(folder / "trained", "train-editor", {}, key=key, details=details) as run:
            run.append({"step": 1, "kind": "train", "loss": 2.5})
            run.append({"step": 1, "kind": "validation", "loss": 2.0, "kl": 0.1})
            run.write_summary(summary_of(run.manifest, run.lines(), checkpoint="c"))
    return folder


@pytest.fixture
def run(whole, tmp_path, monkeypatch, cache_dir) -> Callable[..., Ended]:
    """Commands, in a folder with a copy of each finished run."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: invoke(cache_dir, *arguments)


def refused(ended: Ended, *told: str, given: Any = "") -> None:
    """One line, and the exit code of a file that cannot be used. given: what was put into it."""
    assert ended.code == 3, f"{given!r} gave {ended.code}: {ended.err}"
    assert all(part in ended.error for part in told), ended.error


def others(allowed: str) -> Iterator[Any]:
    """Values that a field of these kinds may not have."""
    kinds = allowed.split("|")
    yield from (value for kind, value in SAMPLES.items() if kind not in kinds)
    if "absent" not in kinds:
        yield ABSENT


def changed(value: Any, path: str, to: Any) -> Any:
    """A copy of a JSON value with one field (`a.0.b`) that is another, or not there."""
    copy = json.loads(json.dumps(value))
    *way, last = path.split(".")
    place = copy
    for part in way:
        place = place[int(part) if isinstance(place, list) else part]
    at: Any = int(last) if isinstance(place, list) else last
    if to is ABSENT:
        del place[at]
    else:
        place[at] = to
    return copy


def in_file(path: Path, field: str, allowed: str) -> Iterator[Any]:
    """Puts every wrong value of a field into the file, one after another; in the end it is as it was."""
    before = path.read_text()
    value = json.loads(before)
    for wrong in others(allowed):
        path.write_text(json.dumps(changed(value, field, wrong)))
        yield wrong
    path.write_text(before)


# --- manifest.json, summary.json --------------------------------------------------------------------------------------

MANIFESTS = {
    "evaluated": {
        "command": "text", "config": "", "config.protocol": "", "config.protocol.observe": "", "config_hash": "text",
        "config.protocol.observe.generate": "flag", "key": "", "status": "", "method": "text|null", "model": "text",
        "dataset": "", "dataset.name": "text", "dataset.records_total": "", "dataset.limit": "null|negative",
        "protocol": "", "protocol.batch_size": "", "protocol.evaluated": "", "seeds": "", "versions": "",
        "started": "text|null|absent", "resumed": "list|absent", "processes": "absent",
    },
    "lifelong": {"config.protocol.first": "absent", "config.protocol.stop_on_collapse": "flag|absent",
                 "config.protocol.collapse_below": "number|negative|absent"},
    "sme": {"protocol": "", "config.protocol.answers": ""},
    "traced": {"config.protocol.window": "", "config.protocol.noise_std": "null|number|negative", "protocol.facts": ""},
    "trained": {"protocol.cases": "", "dataset.source": "text"},
}  # fmt: skip
SUMMARIES = {
    "evaluated": {
        "method": "text", "model": "text", "dataset": "", "dataset.records_selected": "", "n": "", "failed": "",
        "edits": "", "protocol": "", "protocol.evaluated": "", "protocol.observe": "", "metrics": "",
        "metrics.efficacy_success": "absent", "metrics.efficacy_success.after": "absent",
        "metrics.efficacy_success.after.mean": "null|number|negative", "metrics.efficacy_success.after.ci95": "null",
        "seconds": "", "seconds_per_edit": "null|number", "peak_memory_bytes": "",
    },
    "lifelong": {"checkpoints": "", "checkpoints.0.edits": "", "checkpoints.0.metrics": "",
                 "checkpoints.0.model": "object", "collapse": "null", "stopped": "flag"},
    "sme": {"sme": "", "sme.rates": "", "sme.rates.SR": "absent", "sme.folds": "", "sme.folds.0.finished": "flag",
            "protocol.answers": ""},
    "traced": {"traced": "", "trace": "", "trace.high": "", "trace.indirect_effect": "", "peaks": "",
               "peaks.mlp.role": "", "protocol.window": "", "proposal": "null"},
    "trained": {"best": "", "best.step": "", "best.metrics": "", "seconds": "", "checkpoint": "text|null"},
}  # fmt: skip


def fields(table: dict[str, dict[str, str]]) -> list[tuple[str, str, str]]:
    return [(run, field, allowed) for run, rows in table.items() for field, allowed in rows.items()]


@pytest.mark.parametrize(("name", "field", "allowed"), fields(MANIFESTS))
def test_manifests(run, name, field, allowed):
    Path(name, "summary.json").unlink()  # so that the table is made anew, of what the manifest says
    for wrong in in_file(Path(name, "manifest.json"), field, allowed):
        refused(run("show", name), f"{name}/manifest.json", given=wrong)
        assert "unreadable" in run("ls", "runs", "--runs-dir", ".").out


@pytest.mark.parametrize(("name", "field", "allowed"), fields(SUMMARIES))
def test_summaries(run, name, field, allowed):
    for wrong in in_file(Path(name, "summary.json"), field, allowed):
        refused(run("show", name), f"{name}/summary.json", given=wrong)
        assert run("ls", "runs", "--runs-dir", ".").code == 0


@pytest.mark.parametrize("file", ["manifest.json", "summary.json", "results.jsonl"])
@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "NaN", "\x00", '{"a": 1e999999', "[" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP, "\udcff"],
    ids=["empty", "torn", "list", "null", "NaN", "zero", "number", "deep", "deep and whole", "no text"],
)
def test_files_that_are_no_json(run, file, text):
    path = Path("evaluated", file)
    right = path.read_bytes() if file == "results.jsonl" else b""  # the lines that come after
    path.write_bytes(text.encode("utf-8", "surrogateescape") + b"\n" + right)
    refused(run("show", "evaluated"), file)
    refused(run("compare", "evaluated", "lifelong", "--anyway"), file)


def test_comparisons_and_lists_of_what_was_tampered_with(run):
    for file, field, wrong in (
        ("manifest.json", "config", 5), ("manifest.json", "method", []), ("summary.json", "metrics", {"x": {}}),
        ("summary.json", "seconds_per_edit", "x"), ("summary.json", "n", None),
    ):  # fmt: skip
        path = Path("evaluated", file)
        before = path.read_text()
        path.write_text(json.dumps(changed(json.loads(before), field, wrong)))
        refused(run("compare", "evaluated", "lifelong", "--out", "c"), file)
        assert json.loads(run("ls", "runs", "--runs-dir", ".", "--json").out)[1]["status"] == "unreadable"
        path.write_text(before)
    assert run("compare", "evaluated", "lifelong", "--anyway").code == 0


# --- results.jsonl ----------------------------------------------------------------------------------------------------

LINES = {
    "evaluated": {
        "case_id": "text", "step": "", "requests": "", "requests.0.prompt": "text", "requests.0.subject": "text|null",
        "requests.0.target_true": "text|null", "before": "", "after": "", "before.probes": "",
        "after.probes.0.kind": "", "after.probes.0.prompt": "", "after.probes.0.target": "",
        "after.probes.0.target_nll": "null|number", "after.probes.0.target_hits": "",
        "after.probes.0.target_predicted": "null", "after.probes.0.generated": "text|null", "after.texts": "",
        "after.perplexity": "null", "after.probes.0.group": "text|absent", "after.probes.0.aliases": "absent",
        "after.probes.0.top": "absent", "seconds": "null|number", "error": "text|null", "phases": "absent",
    },
    "lifelong": {"when": "", "edits": "", "sampled": "flag|absent", "before": "", "after": ""},
    "sme": {"when": "", "fold": ""},
    "traced": {"request": "", "known": "flag", "error": "text|null", "tokens": "", "roles": "",
               "high": "number|negative", "scores": "", "noise_std": "number|negative", "scores.mlp.0": ""},
    "trained": {"step": "", "kind": "", "loss": "null|number|negative|absent"},
}  # fmt: skip


@pytest.mark.parametrize(("name", "field", "allowed"), fields(LINES))
def test_lines(run, name, field, allowed):
    path = Path(name, "results.jsonl")
    lines = json_lines(path)
    for wrong in others(allowed):
        path.write_text("".join(json.dumps(line) + "\n" for line in [changed(lines[0], field, wrong), *lines[1:]]))
        refused(run("show", name), "results.jsonl, line 1,", given=wrong)


@pytest.mark.parametrize("name", ["evaluated", "edited", "lifelong", "sme", "traced", "trained"])
@pytest.mark.parametrize("kept", [0, 1], ids=["one torn line", "a whole line and a torn one"])
def test_a_summary_of_more_lines_than_there_are_is_not_shown(run, name, kept):
    """It is of a run that was whole once."""
    path = Path(name, "results.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:kept]) + lines[0][:40])
    if kept == len(lines):  # nothing is gone
        assert run("show", name).code == 0
        return
    for command in (("show", name), ("compare", name, name, "--anyway"), ("report", name, "--out", "page.html")):
        refused(run(*command), "results.jsonl", "torn or gone", "the same command makes")


@pytest.mark.parametrize("name", ["evaluated", "edited", "lifelong", "sme", "traced"])
def test_lines_that_were_lost_are_made_again(run, name):
    """Also by commands that count a run as complete once it has a summary."""
    path, whole = Path(name, "results.jsonl"), Path(name, "summary.json")
    lines, before = json_lines(path), json.loads(whole.read_text())["metrics"]
    path.write_text(json.dumps(lines[0])[:40])
    small = SMALL if COMMANDS[name][0] != "trace" else ()
    again = (*COMMANDS[name], f"run_dir={name}", "model.device=cpu", "figures=false", *small)
    assert "goes on from there" in run(*again, "--dry-run").out
    assert run(*again).code == 0
    assert json.loads(whole.read_text())["metrics"] == before
    assert [line["case_id"] for line in json_lines(path)] == [line["case_id"] for line in lines]


def test_a_turn_tells_what_was_said_before_and_after_its_edit(run):
    path = Path("sme", "results.jsonl")
    lines = json_lines(path)
    at = next(number for number, line in enumerate(lines) if line["when"] == "turn" and line["mistake"])
    for side in ("before", "after"):
        path.write_text("".join(json.dumps({**line, side: None} if n == at else line) + "\n"
                                for n, line in enumerate(lines)))  # fmt: skip
        refused(run("show", "sme"), f"results.jsonl, line {at + 1},")


def test_lines_that_contradict_each_other_or_are_there_twice(run):
    path = Path("evaluated", "results.jsonl")
    first, second = json_lines(path)
    probes = first["after"]["probes"]
    short = {**probes[0], "top": {"ids": [[1, 2]], "logprobs": [[-0.5]]}}
    variants = {
        "is there already, as line 1": [first, first],
        "is there already, as line 2": [first, second, {**first, "case_id": second["case_id"]}],
        "the probes of case": [changed(first, "after.probes", probes[:1]), second],
        "top is": [changed(first, "after.probes", [short, *probes[1:]]), second],
        "not an answer with its tokens": [changed(first, "after.probes.0.target_hits", []), second],
    }
    for told, lines in variants.items():
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        refused(run("show", "evaluated"), "results.jsonl, line ", told)
        if "as line 2" in told:
            refused(run(*COMMANDS["evaluated"], "run_dir=evaluated", "model.device=cpu", *SMALL), told)
    traced = Path("traced", "results.jsonl")
    lines = [line for line in json_lines(traced) if line["known"]]
    other = {**lines[0], "case_id": "other", "scores": {"mlp": [row[:-1] for row in lines[0]["scores"]["mlp"]]}}
    traced.write_text("".join(json.dumps(line) + "\n" for line in [lines[0], other]))
    Path("traced", "summary.json").unlink()
    refused(run("show", "traced"), "line 2,", "the layers are others")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("evaluated", {"case_id": "of another run"}),
        ("edited", {"case_id": "1"}),
        ("lifelong", {"case_id": "of another run"}),
        ("lifelong", {"edits": 7}),
        ("sme", {"fold": 3}),
        ("sme", {"edits": 99}),
        ("traced", {"case_id": "of another run"}),
    ],
)
def test_lines_of_another_run_are_refused_when_a_run_goes_on(run, name, change):
    path = Path(name, "results.jsonl")
    lines = json_lines(path)
    path.write_text("".join(json.dumps(line) + "\n" for line in [{**lines[0], **change}, *lines[1:]]))
    arguments = COMMANDS[name]
    small = () if arguments[0] == "trace" else SMALL
    refused(run(*arguments, f"run_dir={name}", "model.device=cpu", *small), "is not of this run", "delete that line")


@pytest.mark.parametrize(
    ("file", "field", "wrong"),
    [
        ("manifest.json", "config", None),
        ("manifest.json", "key", ["step"]),
        ("manifest.json", "status", []),
        ("results.jsonl", "case_id", ["0"]),
        ("results.jsonl", "before", 5),
    ],
)
def test_runs_that_were_tampered_with_do_not_go_on(run, file, field, wrong):
    path = Path("evaluated", file)
    first, *rest = path.read_text().splitlines() if file.endswith("l") else [path.read_text()]
    path.write_text("\n".join([json.dumps(changed(json.loads(first), field, wrong)), *rest]) + "\n")
    refused(run(*COMMANDS["evaluated"], "run_dir=evaluated", "model.device=cpu", *SMALL), file)


# --- edits ------------------------------------------------------------------------------------------------------------

MODULE = "transformer.h.1.mlp.c_fc"  # 512 × 128
REQUEST = EditRequest("{} is", "Ada", "old", None)
KEYS = torch.zeros(1, 128)


@pytest.fixture(scope="module")
def model() -> LM:
    return embedded_lm()


@pytest.fixture
def lm(model) -> Iterator[LM]:
    yield model
    while model.attached:
        model.detach()


def made(kind: str) -> Edit:
    """A small edit of every class, as an editor could have made it."""
    about = {"score": "mean", "act_ratio": 0.9, "mask_ratio": 0.01, "shard_every": 5, "merge_every": None,
             "density": 0.5, "seed": 0}  # fmt: skip
    cluster = {"answer": [1], "radius": 0.5, "points": [0]}
    memories: dict[str, Any] = {
        "grace": (GracePatch, {"keys": KEYS, "values": torch.zeros(1, 512), "radii": torch.ones(1, 1),
                  "moved": torch.zeros(0, dtype=torch.long), "moved_radii": torch.zeros(0, 1),
                  "retrained": torch.zeros(0, dtype=torch.long), "retrained_values": torch.zeros(0, 512)},
                  {"answers": [[5]], "radius": 1.0, "replace": "last", "include_query": False}),
        "tpatcher": (NeuronPatch, {"keys": KEYS, "biases": torch.zeros(1, 1), "values": torch.zeros(1, 512),
                     "seen": torch.zeros(3, 128)}, {"entrance": MODULE, "edits": 1, "made_for": [[0, 0]]}),
        "melo": (MeloPatch, {"center.0": torch.zeros(512), "points.0": torch.zeros(1, 512),
                 f"right.{MODULE}": torch.zeros(2, 128), f"left.{MODULE}": torch.zeros(512, 2)},
                 {"modules": [MODULE], "rank": 2, "clusters": {"0": cluster}, "blocks": [0], "forgotten": 0}),
        "defer": (DeferPatch, {"left": torch.zeros(512, 1), "right": torch.zeros(1, 128), "router": torch.zeros(128),
                  "threshold": torch.zeros(()), "offset": torch.zeros(512)}, {"seed": 0, "facts": 1, "ranks": [1]}),
        "wise": (WisePatch, {"values.0": torch.zeros(int(mask_of(0, 0, (512, 128), 0.01).sum()))},
                 {"about": about, "units": [{"shard": 0, "facts": 1, "score": 1.0}]}),
    }  # fmt: skip
    if kind in memories:
        cls, tensors, content = memories[kind]
        return cls(MODULE, "", tensors, content)
    name = f"{MODULE}.weight"
    return {
        "factors": lambda: WeightDelta({name: Factors(torch.ones(512, 2), torch.ones(2, 128))},
                                       {"facts": [["a", "b"]]}),
        "dense": lambda: WeightDelta({name: torch.ones(128, 512)}, memory={"keys.0": torch.ones(512, 3)}),
        "state": lambda: WeightState({name: torch.ones(128, 512)}),
        "lookup": lambda: CacheRoute([Fact("a b", "c")], KEYS, 1.0, 30.0),
        "ike": lambda: IkeRoute([Fact("a b", "c")], torch.zeros(1, 1), "none 0.7 x", [["d"]], "none", 0.7,
                                EmbeddingOptions("hidden")),
    }[kind]()  # fmt: skip


KINDS = ("factors", "dense", "state", "grace", "tpatcher", "melo", "defer", "wise", "lookup", "ike")
METHOD = {"name": "m", "type": "ft"}


def saved(kind: str, lm: LM, folder: Path) -> Path:
    edit_store.save(made(kind), folder, lm, [REQUEST], METHOD)
    return folder


def forge(folder: Path, manifest: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> None:
    """Write it with an id that is right again, as whoever knows how would."""
    if tensors is not None:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "edit.safetensors")
    if all(key in manifest for key in edit_store.MEANING):
        manifest["id"] = edit_store.identity(folder / "edit.safetensors", manifest)
    (folder / "edit.json").write_text(json.dumps(manifest))


def load_refused(folder: Path, lm: LM) -> str:
    """What is said where the edit is attached; the model is left as it was."""
    with pytest.raises(EditCliError) as caught:
        edit_store.attach(folder, lm)
    assert lm.attached == []
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code in (2, 3)
    return str(caught.value)


EDIT = {
    "format": "", "kind": "", "type": "", "method": "object", "base_model": "", "base_model.name": "text",
    "base_model.id": "text", "base_model.revision": "text|null", "base_model.dtype": "absent", "touched": "",
    "requests": "", "requests.0.prompt": "text", "state": "object", "parent": "text|null", 
    "method.name": "text|absent", "method.made": "absent", "state_after": "absent",
}  # fmt: skip


@pytest.mark.parametrize(("field", "allowed"), EDIT.items())
def test_edit_manifests(tmp_path, lm, field, allowed, cache_dir, monkeypatch):
    monkeypatch.setattr(saved_edits, "load_model", lambda *_: lm)
    folder = saved("factors", lm, tmp_path / "edit")
    manifest = json.loads((folder / "edit.json").read_text())
    for wrong in others(allowed):
        if field.count(".") and field.rpartition(".")[2] not in json.dumps(manifest) and wrong is ABSENT:
            continue
        forge(folder, changed(manifest, field, wrong))
        load_refused(folder, lm)
        ended = invoke(cache_dir, "apply", str(folder), "--out", str(tmp_path / "out"))
        assert ended.code in (2, 3) and len(ended.err.strip().splitlines()) == 1, ended.err
        assert not (tmp_path / "out").exists()
        while lm.attached:  # what came before the edit that was refused
            lm.detach()


def contents(kind: str) -> dict[str, str]:
    """The fields of an edit's state, and what they may hold."""
    routes = {
        "facts": "",
        "maker": "text",
        "prefixes": "",
        "router": "",
        "threshold": "number|negative",
        "embedding": "text",
    }
    memory = {"module": "", "before": "", "content": ""}
    return {
        "factors": {"info": "object|absent", "info.facts": "absent"},
        "lookup": {"facts": "", "maker": "text", "radius": "null|number|negative", "confidence": "number|negative"},
        "ike": routes,
        "grace": {**memory, "content.answers": "", "content.radius": "number|negative", "content.replace": "",
                  "content.include_query": "flag"},
        "tpatcher": {**memory, "content.entrance": "", "content.edits": "", "content.made_for": ""},
        "melo": {**memory, "content.modules": "", "content.rank": "", "content.clusters": "",
                 "content.clusters.0.radius": "number|negative", "content.clusters.0.points": "", "content.blocks": "",
                 "content.forgotten": ""},
        "defer": {**memory, "content.seed": "negative", "content.facts": "", "content.ranks": ""},
        "wise": {**memory, "content.about": "", "content.about.score": "", "content.about.mask_ratio": "number",
                 "content.units": "", "content.units.0.shard": "", "content.units.0.score": "number|negative"},
    }[kind]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "field"),
    [(kind, field) for kind in KINDS if kind not in ("dense", "state") for field in contents(kind)],
)
def test_what_an_edit_says(tmp_path, lm, kind, field):
    folder = saved(kind, lm, tmp_path / "edit")
    manifest = json.loads((folder / "edit.json").read_text())
    for wrong in others(contents(kind)[field]):
        forge(folder, changed(manifest, f"state.{field}", wrong))
        load_refused(folder, lm)
    forge(folder, manifest)
    assert len(edit_store.attach(folder, lm)) == 1
    lm.detach()


def tampered_tensors(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """One thing wrong with one of the tensors."""
    for name, tensor in tensors.items():
        rest = {other: value for other, value in tensors.items() if other != name}
        yield f"{name} missing", rest
        yield f"{name} int8", {**tensors, name: tensor.to(torch.int8)}
        yield f"{name} with a dimension more", {**tensors, name: tensor[None]}
        if tensor.dim() and name != "seen":  # of which there may be any number
            yield f"{name} longer", {**tensors, name: torch.cat([tensor, tensor.new_zeros(1, *tensor.shape[1:])])}
        if tensor.is_floating_point() and tensor.numel():
            for value in (float("nan"), float("inf")):
                yield f"{name} {value}", {**tensors, name: torch.full_like(tensor, value)}
        elif tensor.dtype == torch.long:
            yield f"{name} beyond", {**tensors, name: torch.tensor([7]), "moved_radii": torch.ones(1, 1)}
    yield "one too many", {**tensors, "more": torch.zeros(2)}


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_of_edits(tmp_path, lm, kind):
    folder = saved(kind, lm, tmp_path / "edit")
    manifest = json.loads((folder / "edit.json").read_text())
    tensors = load_file(folder / "edit.safetensors")
    count = 0
    for what, wrong in tampered_tensors(tensors):
        if (
            what.endswith("|memory longer")
            or what.endswith("|memory with a dimension more")
            or "|memory missing" in what
        ):
            continue  # for the editor that remembers it: below
        forge(folder, manifest, wrong)
        assert load_refused(folder, lm), what
        count += 1
    assert count >= 5
    forge(folder, manifest, tensors)
    edit_store.attach(folder, lm)
    lm.detach()


FORGED = {
    "requests.0.frame": (["a", "b", "c"], ["a"], "ab"),
    "requests.0.prompt": ("no slot", "{} and {}"),
    "requests.0.subject": (" ",),
    "requests.0.target_new": ("\ud800x",),
}


@pytest.mark.parametrize(("field", "wrongs"), FORGED.items())
def test_facts_that_cannot_be_edited_again(tmp_path, lm, field, wrongs):
    """They are not among what the id covers, and `undo` edits them."""
    folder = saved("factors", lm, tmp_path / "edit")
    manifest = json.loads((folder / "edit.json").read_text())
    for wrong in wrongs:
        (folder / "edit.json").write_text(json.dumps(changed(manifest, field, wrong)))
        assert "edit.json is damaged: requests[0]" in load_refused(folder, lm)


def test_numbers_of_a_kind_that_nobody_writes(tmp_path, lm):
    folder = saved("factors", lm, tmp_path / "edit")
    save_file({"0": torch.ones(2, dtype=torch.float8_e4m3fn)}, folder / edit_store.BY_FACT)
    manifest = json.loads((folder / "edit.json").read_text())
    manifest["by_fact"] = hashlib.sha256((folder / edit_store.BY_FACT).read_bytes()).hexdigest()
    (folder / "edit.json").write_text(json.dumps(manifest))
    with pytest.raises(MissingError, match="not finite"):
        edit_store.by_fact(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * DEEP, '{"format": 1}', '{"format": NaN}'])
def test_edit_manifests_that_are_none(tmp_path, lm, text):
    folder = saved("factors", lm, tmp_path / "edit")
    (folder / "edit.json").write_text(text)
    assert "edit.json" in load_refused(folder, lm)


def test_what_an_editor_remembers(lm, tmp_path):
    """Keys and moments of earlier edits are held against the model when they are taken up."""
    memit = prepared(MEMIT, layers=[0]).on(lm)
    ultra = prepared(UltraEdit, modules=["mlp_out:1"]).on(lm)
    name = "640"
    wrong: list[tuple[Any, dict[str, torch.Tensor]]] = [
        (memit, {"keys.x": torch.ones(512, 1)}),
        (memit, {"keys.99": torch.ones(512, 1)}),
        (memit, {"keys.0": torch.ones(3, 1)}),
        (memit, {"keys.0": torch.ones(512)}),
        (memit, {"keys.0": torch.ones(512, 1, dtype=torch.int8)}),
        (ultra, {"count.128x512": torch.tensor(3)}),
        (ultra, {"count.x": torch.tensor(3)}),
        (ultra, {"count.128x512": torch.tensor(3.5), "mean.128x512": torch.ones(int(name)),
                            "squares.128x512": torch.ones(int(name))}),
        (ultra, {"count.128x512": torch.tensor(3), "mean.128x512": torch.ones(2),
                            "squares.128x512": torch.ones(int(name))}),
    ]  # fmt: skip
    for editor, memory in wrong:
        with pytest.raises(MissingError, match="an earlier edit is damaged"):
            editor.recall(WeightDelta({}, {}, memory))


def test_edits_that_were_tampered_with_are_no_base(run, lm, monkeypatch):
    monkeypatch.setattr("edit_cli.experiment.base.load_model", lambda *_: lm)
    manifest = json.loads(Path("edited/edits/0000/edit.json").read_text())
    tensors = load_file("edited/edits/0000/edit.safetensors")
    (name,) = tensors
    for wrong, broken in (
        (changed(manifest, "touched", {}), tensors),
        (changed(manifest, "type", "os.system"), tensors),
        (changed(manifest, "format", True), tensors),
        (manifest, {name: tensors[name].to(torch.int8)}),
    ):
        forge(Path("edited/edits/0000"), dict(wrong), broken)
        ended = run(*COMMANDS["edited"], "base_edit=edited/edits/0000", "run_dir=other", "model.device=cpu")
        refused(ended, "edited/edits/0000")
        assert lm.attached == []


# --- checkpoints ------------------------------------------------------------------------------------------------------

ABOUT = {
    "type": "c", "base": "b", "recipe": {"lr": 0.1}, "model": {"name": "m"},
    "dataset": {"name": "d", "source": "s", "cases": 3},
}  # fmt: skip


def checkpoint(folder: Path) -> Path:
    checkpoints.save(folder / "mend", nn.Linear(2, 3), ABOUT)
    return folder / "mend"


@pytest.mark.parametrize(
    ("field", "allowed"),
    {"format": "", "type": "text", "base": "text", "recipe": "object", "model": "", "model.name": "text",
     "dataset": "", "dataset.name": "text", "dataset.cases": "absent", "sha256": ""}.items(),
)  # fmt: skip
def test_checkpoints(tmp_path, field, allowed):
    folder = checkpoint(tmp_path)
    for _ in in_file(folder / "editor.json", field, allowed):
        with pytest.raises(MissingError, match=r"editor\.(json|safetensors)"):
            checkpoints.load(folder)
        found = checkpoints.find(tmp_path, {"type": "c", "base": "b", "recipe": {"lr": 0.1}})
        assert [place for place, _ in found] in ([], [folder])
    assert checkpoints.load(folder)[1]["type"] == "c"


def test_networks_of_checkpoints(tmp_path):
    folder = checkpoint(tmp_path)
    path, about = folder / "editor.safetensors", json.loads((folder / "editor.json").read_text())
    tensors = load_file(path)
    for wrong in (
        {}, {"weight": tensors["weight"]}, {**tensors, "more": torch.ones(1)}, {**tensors, "bias": torch.ones(4)},
        {**tensors, "bias": torch.ones(3, dtype=torch.int8)}, {**tensors, "bias": torch.full((3,), float("nan"))},
    ):  # fmt: skip
        save_file(wrong, path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        (folder / "editor.json").write_text(json.dumps({**about, "sha256": digest}))
        with pytest.raises(MissingError, match="mend"):
            checkpoints.fill(nn.Linear(2, 3), checkpoints.load(folder)[0], folder)
    for damage in (b"", b"garbage", path.read_bytes()[:-4]):
        path.write_bytes(damage)
        with pytest.raises(MissingError, match="editor.safetensors"):
            checkpoints.load(folder)


def test_every_edit_of_the_package_says_what_it_is_made_of():
    """Or its file could hold anything."""
    import edit_cli.editors

    for module in iter_modules(edit_cli.editors.__path__):
        import_module(f"edit_cli.editors.{module.name}")

    def below(cls: Any) -> Iterator[Any]:
        for each in cls.__subclasses__():
            yield each
            yield from below(each)

    own = [cls for cls in below(Edit) if cls.__module__.startswith("edit_cli.") and not isabstract(cls)]
    assert len(own) >= len(KINDS)
    for cls in own:
        assert any("sizes" in vars(base) for base in cls.__mro__ if base is not Edit), cls
        if issubclass(cls, MemoryPatch):
            assert cls.holds is not MemoryPatch.holds, cls


def test_how_many_ways_to_tamper_are_tried():
    """The table is as long as it is meant to be."""
    files = sum(len(list(others(allowed))) for table in (MANIFESTS, SUMMARIES, LINES) for *_, allowed in fields(table))
    edits = sum(len(list(others(allowed))) for allowed in EDIT.values())
    said = sum(
        len(list(others(allowed)))
        for kind in KINDS
        if kind not in ("dense", "state")
        for allowed in contents(kind).values()
    )
    assert files + edits + said >= 119
