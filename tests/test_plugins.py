"""Methods, data sets and metrics from outside: the package that docs/adding-a-*.md make, in a folder of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import edit_cli
from edit_cli.config import registry
from edit_cli.errors import MissingError, UsageError
from edit_cli.metrics.registry import METRICS, metrics

DOCS = Path(__file__).parent.parent / "docs"
METHOD, DATASET, METRIC = (f"adding-a-{what}.md" for what in ("method", "dataset", "metric"))
NUDGE = ("method=nudge", "method.layer=3", "limit=2")
FT = ("method=ft", "method.steps=1", "limit=2")


def files(page: str) -> dict[str, str]:
    """{name: text} of the files that a page shows: a block behind a paragraph that names it last."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.findall(r"`([\w./-]+\.\w+)`[^`]*?:?\n\n```(?:python|yaml|toml|json)\n(.*?)^```", text, re.M | re.S)
    return dict(found)


@pytest.fixture
def package(tmp_path, monkeypatch) -> Iterator[Path]:
    """The folder of a package, which Python finds and forgets again."""
    monkeypatch.syspath_prepend(str(tmp_path / "away"))
    yield tmp_path / "away"
    registry.admit(())
    for name in [name for name in sys.modules if name.partition(".")[0] == "nudges"]:
        del sys.modules[name]


def put(folder: Path, page: str) -> None:
    for name, text in files(page).items():
        if not name.startswith("edit_cli"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")


def install(folder: Path) -> None:
    """Leave what an installer would: the metadata that pyproject.toml stands for."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    about = folder / f"{project['name']}-{project['version']}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = [
        line
        for group, entries in project["entry-points"].items()
        for line in (f"[{group}]", *(f"{name} = {value}" for name, value in entries.items()))
    ]
    (about / "entry_points.txt").write_text("\n".join(lines))
    (folder / "nudges" / "__init__.py").write_text('"""Says nothing."""\n')


def refused(ended, code: int, *words: str) -> None:
    (told,) = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert ended.code == code and "Traceback" not in ended.err
    assert all(word in told for word in words), told


def test_a_named_package_brings_a_method(package, cli):
    put(package, METHOD)
    ended = cli("evaluate", "plugins=[nudges]", *NUDGE, "protocol.save_edits=true", quick=True)
    assert ended.code == 0, ended.err
    assert "nudge on tiny-gpt2: 2 facts edited, one at a time" in ended.out
    run = Path("runs/evaluate/counterfact/tiny-gpt2/nudge")
    manifest = json.loads((run / "manifest.json").read_text())
    assert (manifest["config"]["method"]["type"], manifest["plugins"]) == ("nudge", {"nudges": "0.1"})
    assert "plugins" not in manifest["config"]
    texts = [file.read_text() for file in run.rglob("*.json")]
    assert len(texts) == 4 and not any("nudges.method" in text or "edit_cli" in text for text in texts)
    # its edits are of this package's kind, so that they need no plug-in
    registry.admit(())
    assert cli("apply", str(run / "edits/0000"), "--out", "baked").code == 0
    refused(cli("evaluate", *NUDGE, quick=True), 2, "method=nudge: there is no such method")


def test_a_folder_of_settings_beside_it(package, cli):
    put(package, METHOD)
    words = ("evaluate", "method=hard-nudge", "--config-dir", str(package / "settings"), "limit=2")
    refused(cli(*words, quick=True), 2, "nudges.method.Nudge", "plugins=[nudges]")
    ended = cli(*words, "plugins=[nudges]", quick=True)
    assert ended.code == 0, ended.err
    saved = json.loads(Path("runs/evaluate/counterfact/tiny-gpt2/hard-nudge/manifest.json").read_text())
    assert saved["config"]["method"] == {"type": "nudge", "layer": 3, "size": 0.2}
    listed = cli("show-config", "nudge", "plugins=[nudges]")
    assert listed.code == 0 and "Of what is added." in listed.words and "a number above 0" in listed.words
    assert "method.size=0.1" in cli("evaluate", "plugins=[nudges]", "method=nudge", "--help").out
    # values for a model, of a method that has no file
    found = cli(
        "evaluate", "plugins=[nudges]", "method=nudge", "--config-dir", str(package / "settings"), "--cfg", "job"
    )
    assert "layer: 3" in found.out and "size: 0.1" in found.out
    refused(cli(*words, "plugins=[nudges]", "method.size=-1", quick=True), 2, "method.size=-1: give a number above 0")
    refused(cli(*words, "plugins=[nudges]", "method.sizes=1", quick=True), 2, "did you mean method.size?")


def test_an_installed_package_needs_no_naming(package, cli):
    put(package, METHOD)
    install(package)
    ended = cli("evaluate", *NUDGE, quick=True)
    assert ended.code == 0, ended.err
    listed = cli("ls", "methods").out
    assert "nudge " in listed and "from nudges 0.1" in listed
    assert "method.size=0.1" in cli("evaluate", "method=nudge", "--help").out
    manifest = json.loads(Path("runs/evaluate/counterfact/tiny-gpt2/nudge/manifest.json").read_text())
    assert manifest["plugins"] == {"nudges": "0.1"}


def outside(package: Path) -> dict[str, str]:
    """The environment of a process that finds the package, and takes no options of the suite that starts it."""
    return {**os.environ, "PYTHONPATH": str(package), "PYTEST_ADDOPTS": ""}


def test_the_suite_for_methods_runs_outside(package):
    """In a process and a folder that know nothing of this checkout but the installed package."""
    put(package, METHOD)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_nudge.py"],
        cwd=package, env=outside(package), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert re.search(r"^1[0-9] passed", done.stdout, re.M), done.stdout


@pytest.mark.slow
def test_the_suite_for_methods_finds_faults(package):
    """A method that leaves something behind, and one whose second edit hangs on what is not saved."""
    put(package, METHOD)
    path = package / "nudges" / "method.py"
    text = path.read_text()
    leaves = text.replace("        embeddings =", "        self.lm.module(name).bias.data += 1\n        embeddings =")
    hangs = text.replace("self.config.size *", "self.count *").replace(
        "        name =", "        self.count = getattr(self, 'count', 0.0) + 0.1\n        name ="
    )
    for broken, told in ((leaves, "leaves_the_model_bit_for_bit"), (hangs, "goes_on_from_what_was_saved")):
        assert broken != text
        path.write_text(broken)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_nudge.py", "-k", "Conv1D"],
            cwd=package, env=outside(package), capture_output=True, text=True,
        )  # fmt: skip
        assert (
            done.returncode == 1
            and f"test_{'a_sequence_' if told[0] == 'g' else 'making_an_edit_'}{told}" in done.stdout
        )


def test_a_named_package_brings_a_data_set(package, cli):
    put(package, METHOD)
    put(package, DATASET)
    facts = package / "capitals.jsonl"
    facts.write_text(facts.read_text() + '{"country": "Chile", "capital": "Lima", "written": "Lima"}\n')
    chosen = ("plugins=[nudges]", "dataset=capitals", f"dataset.path={facts}")
    ended = cli("evaluate", *NUDGE, *chosen, quick=True)
    assert ended.code == 0, ended.err
    assert "written is the capital already (1)" in ended.err
    manifest = json.loads(Path("runs/evaluate/capitals/tiny-gpt2/nudge/manifest.json").read_text())
    assert manifest["config"]["dataset"]["type"] == "capitals"
    lines = Path("runs/evaluate/capitals/tiny-gpt2/nudge/results.jsonl").read_text().splitlines()
    assert [len(json.loads(line)["after"]["probes"]) for line in lines] == [3, 2]


def test_a_named_package_brings_a_metric(package, cli):
    put(package, METHOD)
    assert cli("evaluate", *FT, quick=True).code == 0  # without it
    put(package, METRIC)
    ended = cli("evaluate", *FT, "plugins=[nudges]", quick=True)  # the same run, from what was observed
    assert ended.code == 0, ended.err
    assert "OF PLUG-INS" in ended.out and "its reply begins with the new answer" in ended.words
    run = "runs/evaluate/counterfact/tiny-gpt2/ft"
    entry = json.loads(Path(run, "summary.json").read_text())["metrics"]["begins"]
    assert (entry["before"]["n"], entry["after"]["n"], entry["before"]["mean"]) == (2, 2, 0.0)
    compared = cli("compare", run, "--plugin", "nudges", "--metrics", "begins", "--out", "table")
    assert compared.code == 0, compared.err
    assert "begins" in compared.out and "begins" in Path("table.csv").read_text()
    assert "its reply begins" in cli("ls", "metrics", "--plugin", "nudges").out
    assert cli("show", run, "--plugin", "nudges").code == 0
    registry.admit(["nudges"])
    assert "begins" in edit_cli.read(run).metrics["metric"].tolist()
    registry.admit(())
    for command in (("show", run), ("compare", run)):
        refused(cli(*command), 3, "summary.json has the metric 'begins'", "--plugin PACKAGE")
    assert metrics().keys() == METRICS.keys()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ('"%"', "has the unit 'shouts': choose one of"),
        ('Metric("begins"', "says that its id is other"),
        (", of=begins", "is no Metric with a function `of`"),
        ("import Mapping", "begins of the plug-in nudges 0.3 cannot be loaded: cannot import name"),
    ],
)
def test_metrics_that_are_none_are_told(package, changed, told):
    put(package, METHOD)
    put(package, METRIC)
    path = package / "nudges" / "metrics.py"
    replacement = {'"%"': '"shouts"', 'Metric("begins"': 'Metric("other"', "import Mapping": "import Nothing"}
    path.write_text(path.read_text().replace(changed, replacement.get(changed, "")))
    registry.admit(["nudges"])
    with pytest.raises(UsageError, match=re.escape(told)):
        metrics()


def test_a_metric_that_fails_says_where(package, cli):
    put(package, METHOD)
    put(package, METRIC)
    path = package / "nudges" / "metrics.py"
    path.write_text(path.read_text().replace('line[side]["probes"]', 'line[side]["prbes"]'))
    ended = cli("evaluate", *FT, "plugins=[nudges]", quick=True)
    assert ended.code == 2 and "the metric begins of a plug-in failed on case" in ended.err


EDIT = '''
from dataclasses import dataclass
from typing import ClassVar

from edit_cli.edits.edit import WeightDelta
from nudges.method import Nudge


class Own(WeightDelta):
    """An edit of a class of its own."""


class Keeps(Nudge):
    def edit(self, requests):
        return Own(super().edit(requests).updates)
'''


def test_edits_of_a_plug_in_load_where_it_is_named(package, cli):
    put(package, METHOD)
    (package / "nudges" / "own.py").write_text(EDIT)
    declared = package / "nudges" / "__init__.py"
    lines = 'ENTRY_POINTS["edit_cli.methods"]["keeps"] = "nudges.own:Keeps"\n'
    declared.write_text(declared.read_text() + lines)
    words = ("edit", "method=keeps", "method.layer=3", "edit.prompt=Paris is in", "edit.target=Peru", "run_dir=r",
             "plugins=[nudges]")  # fmt: skip
    refused(cli(*words, quick=True), 2, "nudges.own.Own has no name", "edit_cli.edits")
    registry.admit(())
    for name in [name for name in sys.modules if name.partition(".")[0] == "nudges"]:
        del sys.modules[name]
    declared.write_text(declared.read_text() + 'ENTRY_POINTS["edit_cli.edits"] = {"own": "nudges.own:Own"}\n')
    ended = cli(*words, "overwrite=true", quick=True)
    assert ended.code == 0, ended.err
    assert json.loads(Path("r/edits/0000/edit.json").read_text())["type"] == "own"
    refused(cli("apply", "r", "--out", "baked"), 3, "edits of the kind 'own' are not known", "plugins=[mypackage]")
    assert cli("apply", "r", "--out", "baked", "--plugin", "nudges").code == 0


def test_no_file_names_a_plug_in(package, cli, tmp_path):
    """Neither a folder of settings nor what a run or an edit says."""
    put(package, METHOD)
    folder = tmp_path / "theirs"
    (folder / "method").mkdir(parents=True)
    (folder / "method" / "theirs.yaml").write_text("# @package _global_\nplugins: [nudges]\nmethod: {layers: [3]}\n")
    ended = cli("evaluate", "method=theirs", "--config-dir", str(folder), "limit=2", quick=True)
    assert ended.code == 2
    assert "nudges" not in sys.modules
    for wrong in ("plugins=nudges", "plugins=null", "plugins=[1]", "plugins=[a.b]", "plugins=[no-package]"):
        refused(cli("evaluate", wrong, quick=True), 2, "plugins=")
    assert cli("evaluate", "-m", "plugins=[nudges],[]", "seed=1", quick=True).code == 2


def test_names_of_our_own_are_taken(package, cli):
    put(package, METHOD)
    declared = package / "nudges" / "__init__.py"
    declared.write_text(declared.read_text() + 'ENTRY_POINTS["edit_cli.methods"] = {"memit": "nudges.method:Nudge"}\n')
    refused(cli("evaluate", "plugins=[nudges]", quick=True), 2, "nudges 0.1 brings memit", "edit-cli's own")


def test_two_plug_ins_of_one_name_are_told(package, monkeypatch):
    put(package, METHOD)
    (package / "other").mkdir()
    (package / "other" / "__init__.py").write_text('ENTRY_POINTS = {"edit_cli.edits": {"own": "other.x:Y"}}\n')
    declared = package / "nudges" / "__init__.py"
    declared.write_text(declared.read_text() + 'ENTRY_POINTS["edit_cli.edits"] = {"own": "nudges.own:Own"}\n')
    registry.admit(["nudges", "other"])
    with pytest.raises(MissingError, match=r"come from nudges 0\.1 and other: use one"):
        registry.edit_class("own", "edit")
    for wrong in ('{"edit_cli.edits": {"own": "os:system"}}', '{"nothing": {}}', "[1]"):
        registry.admit(())
        sys.modules.pop("other", None)
        (package / "other" / "__init__.py").write_text(f"ENTRY_POINTS = {wrong}\n")
        registry.admit(["other"])
        with pytest.raises(UsageError, match=r"plugins=\[other\]: "):
            registry.plugins(registry.EDITS)
    sys.modules.pop("other", None)
