"""The scripts of experiments/: each is told of in docs, names only what there is, and runs from end to end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from test_docs import refuse_wrong
from warm_cli import warm_cli

from edit_cli.assets import FOLDER
from edit_cli.cli.help import CONFIGURED
from edit_cli.config import catalog
from edit_cli.metrics.registry import METRICS
from edit_cli.report import published

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path.stem for path in (ROOT / "experiments").glob("*.sh") if path.stem != "scale")
SCALES = ("tiny", "small", "paper")
GROUPS = {*catalog.GROUPS.values(), "protocol"}
ARGUMENTS = {  # of those that take more than a place to write to; `known` is a model with the records that it knows
    "compare_on_records": ["known"],
    "make_fact_model": ["few.json", "out"],
    "real_models": ["known", "known/records.json", "known/corpus.txt", "out"],
    "ten_thousand_edits": ["known/records.json", "known", "out"],
}
PAPER = {  # what their users have to bring at paper scale
    "enn_images": ["model.id=folder", "dataset.path=folder"],
    "enn_translation": ["dataset.path=file", "dataset.reference_path=file"],
}
NEEDS = {"enn_translation": "sacrebleu", "real_models": "optuna"}
RECORD = """() { printf '%s\\n' "$@" '' >> recorded\n}"""  # in the place of a program: it writes down how it was called


def start(script: str, scale: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a folder."""
    words = [str(ROOT / "experiments" / f"{script}.sh"), *ARGUMENTS.get(script, ["out"])]
    words += PAPER.get(script, []) if scale == "paper" else []
    environment = {**os.environ, "SCALE": scale, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)


def commands(script: str, scale: str, folder: Path, **environment: str) -> Iterator[list[str]]:
    """The words of each command that a script gives at a scale, nothing of which is run."""
    (folder / "known").mkdir(exist_ok=True)
    (folder / "recorded").unlink(missing_ok=True)
    recorded = {f"BASH_FUNC_{name}%%": RECORD for name in ("edit-cli", "python")}
    ended = start(script, scale, folder, **recorded, **environment)
    assert ended.returncode == 0, ended.stderr
    for command in (folder / "recorded").read_text().split("\n\n"):
        if words := command.split("\n") if command else []:
            yield words


@pytest.mark.parametrize("scale", ["tiny", *(pytest.param(scale, marks=pytest.mark.slow) for scale in SCALES[1:])])
def test_scripts_name_only_what_there_is(scale, tmp_path):
    """Their methods, data, models, keys, metrics and published tables; and no place is named for two different runs."""
    for script in SCRIPTS:
        places: dict[str, dict[str, str]] = {}
        for words in commands(script, scale, tmp_path):
            if words[0] == "compare":
                options = dict(pairwise(words))
                assert set(options["--metrics"].split(",")) <= METRICS.keys(), script
                assert set(options.get("--published", published.keys()[0]).split(",")) <= set(published.keys())
            elif words[0] in CONFIGURED:
                given = dict(word.split("=", 1) for word in words[1:])
                assert places.setdefault(given.get("run_dir", str(words)), given) == given, script
                groups = given.keys() & GROUPS
                wrong = [f"{group}={given[group]}" for group in groups if given[group] not in catalog.names(group)]
                assert wrong == [], script
                known = catalog.keys(words[0], words[1:])
                keys = {key for key in given.keys() - groups if "method.store" not in key}  # which is a data set
                assert sorted(keys - known.keys()) == [], script


@pytest.mark.slow
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("script", SCRIPTS)
def test_commands_of_a_script_compose(script, scale, tmp_path):
    moving = ("run_dir=", "tag=", "limit=", "protocol.batch_size=", "protocol.checkpoints=")
    every = commands(script, scale, tmp_path)
    told = [[word for word in words if not word.startswith(moving)] for words in every if words[0] in CONFIGURED]
    for words in {tuple(words): words for words in told}.values():
        refuse_wrong(words)


def test_docs_tell_of_every_script():
    page = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    assert [script for script in SCRIPTS if f"experiments/{script}.sh" not in page] == []
    told = {line.split(".sh")[0] for line in page.split("experiments/")[1:] if ".sh" in line.split("`")[0]}
    assert told - {"*"} <= {*SCRIPTS, "scale"}


@pytest.mark.parametrize("script", [*SCRIPTS, "scale"])
def test_a_script_is_one_that_bash_reads(script):
    subprocess.run(["bash", "-n", ROOT / "experiments" / f"{script}.sh"], check=True)


def test_a_scale_is_one_of_three_and_the_environment_comes_first(tmp_path):
    ended = start("rome_table", "huge", tmp_path)
    assert (ended.returncode, ended.stderr) == (2, "SCALE=huge: choose tiny, small or paper\n")
    asked, compared = commands("rome_table", "small", tmp_path, METHODS="rome", LIMIT="7")
    assert {"method=rome", "limit=7"} <= set(asked) and compared[0] == "compare"


@pytest.fixture(scope="module")
def warm(tmp_path_factory) -> Iterator[Path]:
    with warm_cli(tmp_path_factory.mktemp("warm")) as folder:
        yield folder


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_runs_at_tiny_scale(script, tmp_path, warm, cache_dir):
    pytest.importorskip(NEEDS.get(script, "torch"))
    shutil.copytree(FOLDER / "tiny-gpt2", tmp_path / "known")
    for name in ("records.json", "corpus.txt"):
        shutil.copy(FOLDER / "world" / name, tmp_path / "known")
    records = json.loads((FOLDER / "world" / "records.json").read_text())
    (tmp_path / "few.json").write_text(json.dumps(records[:8]))
    ended = start(
        script, "tiny", tmp_path, PATH=f"{warm}:{os.environ['PATH']}", PYTHON=sys.executable, HOME=str(cache_dir)
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    if script == "make_fact_model":
        assert (tmp_path / "out" / "records.json").exists()
    elif script == "train_base":
        assert {model.parent.name for model in tmp_path.rglob("model.safetensors")} >= {"claims", "questions"}
    else:
        assert list(tmp_path.rglob("results.jsonl")) and "cases" in ended.stdout
