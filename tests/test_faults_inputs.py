"""Wrong inputs made from a table: every method's and data set's keys with values that they cannot have, and
combinations that make no sense.

Each gets one line that names what is wrong, an exit code that tells its kind, and leaves nothing behind.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import hydra
import pytest
from omegaconf import DictConfig, OmegaConf

from edit_cli.config import catalog
from edit_cli.config.build import register_resolvers

pytestmark = pytest.mark.faults

METHODS, DATASETS = catalog.names("method"), catalog.names("dataset")
OFFLINE = {"HF_HUB_OFFLINE": "1"}
Wrong = tuple[tuple[str, ...], int, str]  # (command line, exit code, what the message names)


def composed(*overrides: str) -> DictConfig:
    register_resolvers()
    with hydra.initialize_config_module("edit_cli.conf", version_base="1.3"):
        return hydra.compose("evaluate", list(overrides))


def leaves(node: Any, prefix: str) -> list[tuple[str, Any]]:
    """(key, value) of every setting below a node that holds a plain value."""
    found: list[tuple[str, Any]] = []
    plain: Any = OmegaConf.to_container(node)
    for key in node:
        child = node._get_node(key)
        if key == "_target_" or child is None or child._is_interpolation() or child._is_missing():
            continue
        if isinstance(child, DictConfig):
            found += [] if child._is_none() else leaves(child, f"{prefix}.{key}")
        else:
            found.append((f"{prefix}.{key}", plain[key]))
    return found


def of_keys(group: str, option: str) -> list[Wrong]:
    """One of each kind that the option's keys allow: a misspelt key, a wrong type, null where a value is needed, a
    number out of all bounds.
    """
    keys = leaves(composed(f"{group}={option}")[group], group)
    numbers = [key for key, value in keys if isinstance(value, int | float) and not isinstance(value, bool)]
    switches = [key for key, value in keys if isinstance(value, bool)]
    lists = [key for key, value in keys if isinstance(value, list)]
    chosen = ("evaluate", f"{group}={option}")
    found: list[Wrong] = [((*chosen, f"{group}.no_such_key=1"), 2, f"{group}.no_such_key")]
    found += [((*chosen, f"{key}=abc"), 2, key) for key in numbers[:1]]
    found += [((*chosen, f"{key}=-7.5"), 2, key) for key in numbers[-1:] if "threshold" not in key]
    found += [((*chosen, f"{key}=perhaps"), 2, key) for key in switches[:1]]
    found += [((*chosen, f"{key}=null"), 2, key) for key in switches[-1:]]
    found += [((*chosen, f"{key}=[[1]]"), 2, key) for key in lists[:1]]
    return found


CAUSAL_ONLY = ("rome", "memit", "emmet", "pmet", "alphaedit", "blue", "memit-merge", "r-rome", "ike")
TABLE: list[Wrong] = [
    *(wrong for method in METHODS for wrong in of_keys("method", method)),
    *(wrong for dataset in DATASETS for wrong in of_keys("dataset", dataset)),
    *((("evaluate", f"method={name}x"), 2, f"method={name}x") for name in METHODS[:6]),
    *((("evaluate", f"dataset={name}", "dataset.path=nowhere.json"), 2 if name == "digits" else 3, "dataset.path")
      for name in DATASETS),  # digits take no path
    *((("evaluate", f"method={name}", "model=tiny-bert", "dataset=world_claims"), 2, "tiny-bert")
      for name in CAUSAL_ONLY),
    *((("evaluate", f"method={name}", "model=tiny-t5", "dataset=world_qa"), 2, "tiny-t5") for name in CAUSAL_ONLY),
    (("evaluate", "model=tiny-bert"), 2, "tiny-bert"),
    (("evaluate", "method=ft", "model=tiny-bert", "dataset=world"), 2, "label"),
    (("evaluate", "model=nosuch"), 2, "model=nosuch"),
    (("evaluate", "model=hf"), 2, "model.id"),
    (("evaluate", "model=hf", "model.id=/no/such", "method=ft", "method.layers=[0]", "dataset=world"), 3, "model.id"),
    (("evaluate", "model.dtype=float8"), 2, "model.dtype"),
    (("evaluate", "model.device=tpu"), 2, "model.device"),
    (("evaluate", "model.max_memory={0: -1}"), 2, "model.max_memory"),
    (("evaluate", "model.batch_tokens=0"), 2, "model.batch_tokens"),
    (("evaluate", "model.quantize=3bit"), 2, "model.quantize"),
    (("evaluate", "method=memit", "method.layers=[99]"), 2, "method.layers"),
    (("evaluate", "method=memit", "method.layers=[1,1]"), 2, "method.layers"),
    (("evaluate", "method=memit", "method.layers=[]"), 2, "method.layers"),
    (("evaluate", "method=memit", "method.past_keys=some"), 2, "method.past_keys"),
    (("evaluate", "method=memit", "method.rect=1.5"), 2, "method.rect"),
    (("evaluate", "method=memit", "stats.import_npz=nowhere.npz"), 3, "stats.import_npz"),
    (("evaluate", "method=memit", "corpus=file", "corpus.path=nowhere.txt"), 3, "corpus.path"),
    (("evaluate", "limit=0"), 2, "limit"),
    (("evaluate", "limit=many"), 2, "limit"),
    (("evaluate", "seed=99999999999999999999999"), 2, "seed"),
    (("evaluate", "processes=0"), 2, "processes"),
    (("evaluate", "protocol.batch_size=0"), 2, "protocol.batch_size"),
    (("evaluate", "protocol.batch_size=some"), 2, "protocol.batch_size"),
    (("evaluate", "protocol.observe.max_new_tokens=0"), 2, "protocol.observe.max_new_tokens"),
    (("evaluate", "protocol.folds=2"), 2, "protocol.folds"),
    (("evaluate", "--nonsense"), 2, "--nonsense"),
    (("evaluate", "nonsense"), 2, "nonsense"),
    (("evaluate", "=3"), 2, "names no setting"),
    (("evaluate", "+foo=1"), 2, "foo"),
    (("evaluate", "limit=1,2"), 2, "limit"),
    (("evaluate", "--config-dir", "nowhere"), 2, "nowhere"),
    (("evaluate", "--cfg", "jobs"), 2, "--cfg jobs"),
    (("evaluate", "dataset.ids=[1,1]"), 2, "dataset.ids"),
    (("evaluate", "dataset.ids=[nobody]"), 3, "dataset.ids"),
    (("evaluate", "dataset.split=nosuch"), 2, "dataset.split"),
    (("evaluate", "dataset.offset=100000"), 2, "dataset"),
    (("evaluate", "method=mend", "cache_dir=empty"), 3, "train"),
    (("evaluate", "method=mend", "method.checkpoint=nowhere"), 3, "nowhere"),
    (("sequential", "protocol.checkpoints=[0]"), 2, "protocol.checkpoints"),
    (("sequential", "protocol.checkpoints=[9999]", "limit=4"), 2, "protocol.checkpoints"),
    (("sequential", "protocol=sme", "protocol.folds=999"), 2, "protocol.folds"),
    (("sequential", "protocol=nosuch"), 2, "protocol=nosuch"),
    (("train-editor", "method=memit"), 2, "method=memit"),
    (("train-editor", "method=mend", "dataset=world", "splits.validation=train"), 2, "splits.validation"),
    (("train-editor", "method=mend", "dataset=world", "splits.train=nosuch"), 2, "splits.train"),
    (("trace", "model=tiny-bert", "dataset=world_claims"), 2, "tiny-bert"),
    (("trace", "protocol.kinds=[bones]"), 2, "protocol.kinds"),
    (("calibrate", "side=up"), 2, "side"),
    (("calibrate", "modules=[]"), 2, "modules"),
    (("precompute-stats", "method=ft"), 2, "method=ft"),
    (("precompute-stats", "layers=[]"), 2, "layers"),
    (("precompute-stats", "layers=[77]"), 2, "77"),
    (("edit",), 2, "edit.prompt"),
    (("edit", "edit.prompt=Rome is", "edit.target= "), 2, "edit.target"),
    (("edit", "edit.prompt={} is", "edit.target=x"), 2, "edit.subject"),
    (("edit", "edit.prompt=Rome is", "edit.subject=Paris", "edit.target=x"), 2, "edit.prompt"),
    (("edit", "dataset.path=nowhere.jsonl"), 3, "dataset.path"),
    (("edit", "dataset.path=good.jsonl", "base_edit=nowhere"), 3, "nowhere"),
    (("apply", "nowhere", "--out", "out"), 3, "nowhere"),
    (("apply", "good.jsonl", "--out", "out"), 3, "good.jsonl"),
    (("export", "nowhere", "--to", "peft", "--out", "out"), 3, "nowhere"),
    (("export", "good.jsonl", "--to", "checkpoint", "--out", "out"), 3, "good.jsonl"),
    (("ask", "nowhere", "x"), 3, "nowhere"),
    (("edits", "good.jsonl"), 3, "good.jsonl"),
    (("show", "nowhere"), 3, "nowhere"),
    (("compare", "nowhere", "elsewhere"), 3, "nowhere"),
    (("ls", "nothing"), 2, "nothing"),
    *((("edit", "method=ft", f"dataset.path={name}"), code, named) for name, code, named in (
        ("empty.jsonl", 3, "empty.jsonl"), ("empty.csv", 3, "empty.csv"), ("broken.json", 3, "broken.json"),
        ("number.json", 3, "number.json"), ("binary.jsonl", 3, "binary.jsonl"), ("cut.jsonl.gz", 3, "cut.jsonl.gz"),
        ("columns.csv", 3, "columns.csv"), ("nothing-usable.jsonl", 3, "nothing-usable.jsonl"),
    )),
]  # fmt: skip


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with files of wrong forms, and a good one."""
    monkeypatch.chdir(tmp_path)
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    good = json.dumps({"prompt": "{} is", "subject": "Rome", "target_new": "old"})
    texts = {
        "good.jsonl": good,
        "empty.jsonl": "",
        "empty.csv": "prompt,subject,target_new\n",
        "broken.json": '[{"prompt": "{} is", ',
        "number.json": "7",
        "columns.csv": "a,b\n1,2\n",
        "nothing-usable.jsonl": json.dumps({"prompt": "{} is"}),
    }
    for name, text in texts.items():
        Path(name).write_text(text, encoding="utf-8")
    Path("binary.jsonl").write_bytes(bytes(range(256)) * 8)
    Path("cut.jsonl.gz").write_bytes(gzip.compress(good.encode() * 50)[:-20])
    return tmp_path


def test_the_table_is_large_enough():
    assert len(TABLE) >= 200
    assert {wrong[0][1] for wrong in TABLE if wrong[0][0] == "evaluate"} >= {f"method={name}" for name in METHODS}


@pytest.mark.parametrize(("arguments", "code", "named"), TABLE, ids=[" ".join(wrong[0])[:90] for wrong in TABLE])
def test_wrong_input_gets_one_line(cli, files, arguments, code, named):
    before = sorted(path.name for path in files.iterdir())
    ended = cli(*arguments)
    told = [line for line in ended.err.splitlines() if line.startswith("error: ") or line.startswith("Error: ")]
    assert (ended.code, len(told)) == (code, 1), ended.err
    assert named in told[0], ended.err
    assert "Traceback" not in ended.err + ended.out
    left = {path.name for path in files.iterdir()} - {*before, "runs"}
    assert not left, left
    assert not list(files.glob("runs/**/results.jsonl")) or not any(
        path.stat().st_size for path in files.glob("runs/**/results.jsonl")
    )
