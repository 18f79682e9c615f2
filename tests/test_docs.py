"""What README and docs show can be pasted: commands compose, those of the embedded model run, code is complete."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
from conftest import Cli, invoke

from edit_cli.assets import FOLDER as ASSETS
from edit_cli.cli.help import CONFIGURED, OTHERS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ASKED = ("protocol.observe.sample=false", "protocol.observe.max_new_tokens=3", "stats.documents=40")
COMMANDS = {  # those of which limit=3 and ASKED do not make a small one
    "edit": ASKED,
    "inspect": ("limit=8",),
    "trace": ("limit=3", "protocol.copies=2"),
    "train-editor": ("limit=60",),
    "tune": ("limit=4", "trials=1", *ASKED),
}
FEWER = {"protocol.batch_size": "3", "protocol.checkpoints": "[1,3]"}  # than the page says, so as not to pass the limit
TRAINED = ("method.training.steps=4", "method.training.validate_every=2", "method.training.validation_edits=4")
METHODS = {
    "enn": TRAINED,
    "ke": TRAINED,
    "malmen": (*TRAINED, "method.rank=8", "method.edits=4"),
    "mend": (*TRAINED, "method.rank=8"),
    "rp": TRAINED,
    "serac": TRAINED,
    "tpatcher": ("method.memory_size=1000", "method.validation_size=300", "method.top_memory=100", "method.steps=20"),
}
LIFELONG = ("protocol.holdout=0",)
SME = ("limit=8", "protocol.folds=2", "protocol.train=4")


def blocks(page: Path, language: str = "") -> list[str]:
    """The fenced blocks of a page, a command that goes on in the next line as one line."""
    parts = re.split(r"^```(.*)\n", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    fenced = zip(parts[1::4], parts[2::4], strict=True)  # prose, language, block, (nothing), prose, …
    return [re.sub(r"\\\n\s*", "", block) for told, block in fenced if told == language]


def commands(page: Path) -> list[str]:
    lines = [line for block in blocks(page) for line in block.splitlines()]
    return [line for line in lines if line.startswith("edit-cli ")]


def words_of(command: str) -> list[str]:
    return shlex.split(command, comments=True)[1:]


EVERY = [(page.name, command) for command, page in {line: page for page in PAGES for line in commands(page)}.items()]


@pytest.mark.thin(3)
@pytest.mark.parametrize(("page", "command"), EVERY, ids=[f"{page}: {command}" for page, command in EVERY])
def test_every_command_of_the_docs_is_one(page, command):
    if "plugins=[nudges]" in words_of(command):  # whose package tests/test_plugins.py makes and runs
        assert page.startswith("adding-a-")
        return
    refuse_wrong(words_of(command))


def refuse_wrong(words: list[str]) -> None:
    """Settings of a command compose, and are built as far as no file is read."""
    import hydra

    from edit_cli.cli.hydra_launch import kinds
    from edit_cli.config.build import build, register_resolvers
    from edit_cli.config.composed import Composed
    from edit_cli.config.overrides import regroup
    from edit_cli.experiment.setup import method_of

    if words[0] not in CONFIGURED:
        assert words[0] in OTHERS
        return
    arguments = regroup(words[1:], kinds(words[0], words[1:], []))
    overrides = [word for word in arguments if "=" in word and not word.startswith("-")]
    if "-m" in arguments:
        overrides = [re.sub(r"^([\w.]+=(?:\[[^]]*\]|[^,\[]+)),.*", r"\1", word) for word in overrides]
    if "model=MODEL" in overrides:  # to be filled in
        overrides[overrides.index("model=MODEL")] = "model=bert-base-uncased"
    register_resolvers()
    with hydra.initialize_config_module("edit_cli.conf", version_base="1.3"):
        config = hydra.compose(words[0], overrides)
    if words[0] == "tune":  # what is searched needs no value
        chosen = {"method": next(word.partition("=")[2] for word in overrides if word.startswith("method="))}
        composed = Composed("tune", config, chosen)
        composed.settings.refuse(composed)
    for group in ("model", "method", "dataset", "stats"):
        inline = group == "dataset" and words[0] == "edit" and config.edit.prompt is not None
        if group in config and not inline:
            (method_of if group == "method" else build)(config[group])


def smaller(words: list[str]) -> list[str]:
    """Settings that make a command small. What an editor is trained with, evaluating it has to name, too."""
    command, given = words[0], dict(word.split("=", 1) for word in words if "=" in word)
    if command not in CONFIGURED:
        return []
    more = ["model.device=cpu"] if "model.device_map" not in given else []
    more += COMMANDS.get(command, ("limit=3", *ASKED))
    more += METHODS.get(given.get("method", ""), ()) if "-m" not in words else ()
    if command == "sequential":
        more += SME if given.get("protocol") == "sme" else LIFELONG
    more += [f"{key}={value}" for key, value in FEWER.items() if given.get(key, "1") not in ("1", "all")]
    return more


def run(cli: Cli, line: str, cache: Path) -> None:
    """A line of a block, as the shell would run it, with few facts."""
    if not line.startswith("edit-cli "):
        subprocess.run(["bash", "-c", line], check=True)
        return
    words = words_of(line)
    ended = cli(*words, *smaller(words), *((f"cache_dir={cache}",) if words[0] in (*CONFIGURED, "undo") else ()))
    if "says which training is missing" in line:
        assert (ended.code, "edit-cli train-editor method=serac" in ended.err) == (3, True)
        return
    assert ended.code == 0, f"{line}: {ended.err}"


def section(page: Path, heading: str) -> list[str]:
    """Lines of the first block under a heading."""
    text = page.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2]
    return re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[0].splitlines()


def test_facts_of_ones_own_as_the_readme_has_them(cli, cache_dir):
    for line in section(ROOT / "README.md", "Your own facts"):
        run(cli, line, cache_dir)
    assert Path("first/edits/0000/edit.json").exists()  # the second edit has left it alone
    (code,) = blocks(ROOT / "README.md", "python")
    said: list[str] = []
    exec(code, {"print": lambda texts: said.extend(texts)})
    assert said[0].strip().startswith("Paris")


@pytest.mark.slow
def test_the_readmes_comparisons_run(cli, cache_dir):
    run(cli, "edit-cli evaluate method=memit dataset=counterfact", cache_dir)  # what `make demo` runs
    for line in section(ROOT / "README.md", "Comparing"):
        shorter = "limit=40 protocol.folds=2" if "protocol=sme" in line else "limit=3"
        words = words_of(line)
        if words[0] != "sequential":
            run(cli, line, cache_dir)
            continue
        few = (
            shorter.split()
            + ["protocol.observe.max_new_tokens=3", "method.memory_size=200"][: 2 if "sme" in line else 1]
        )
        ended = cli(*words, *few, f"cache_dir={cache_dir}", "model.device=cpu")
        assert ended.code == 0, f"{line}: {ended.err}"


@pytest.mark.slow
def test_the_readmes_training_runs(cli, cache_dir):
    for line in section(ROOT / "README.md", "Editors that learn first"):
        run(cli, line, cache_dir)


@pytest.mark.slow
def test_tracing_as_its_page_has_it(cli, cache_dir):
    for line in commands(ROOT / "docs" / "tracing.md"):
        if not re.search(r"\bmodel=(gpt2-xl|hf)\b", line):
            run(cli, line, cache_dir)


@pytest.mark.slow
def test_sharing_as_its_page_has_it(cli, cache_dir):
    pytest.importorskip("peft")
    page = ROOT / "docs" / "sharing-edits.md"
    for line in [line for block in blocks(page) for line in block.splitlines()]:
        run(cli, line, cache_dir)
    (code,) = blocks(page, "python")
    said: list[str] = []
    exec(code, {"print": said.append})
    assert [text.split()[-1] for text in said] == ["organ", "clarinet"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["getting-started", "tutorials/own-facts", "tutorials/reading-a-table", "tutorials/serving"]
)
def test_what_a_newcomer_pastes_runs(cli, cache_dir, name):
    pytest.importorskip("peft")
    page = ROOT / "docs" / f"{name}.md"
    for block in blocks(page, "sh"):
        if block.startswith("cat > "):
            subprocess.run(["bash", "-c", block], check=True)
    for line in commands(page):
        run(cli, line, cache_dir)
    for code in blocks(page, "python"):
        said: list[str] = []
        exec(code, {"print": lambda texts, said=said: said.extend(texts)})
        assert "organ" in said[0]


EXECUTED = ["README", "getting-started", "sharing-edits", "tracing", "own-facts", "reading-a-table", "serving"]  # above
ELSEWHERE = re.compile(  # a command with one of these needs what is not here
    r"\bmodel=(?!tiny-|gpt2\*|hf model\.id=fact-model\b)"  # weights that do not come along
    r"|gpt2-xl|\bFOLDER\b|\bPICTURES\b|\bFILE\b"  # somebody's own runs and files
    r"|\b(?:trackers|plugins|protocol\.downstream)=|--plugin\b"  # packages that may not be installed
)
OFFLINE = {
    page: lines
    for page in PAGES
    if page.stem not in EXECUTED and (lines := [line for line in commands(page) if not ELSEWHERE.search(line)])
}


def test_a_page_of_which_nothing_is_executed_needs_packages_or_weights():
    left = {page.stem for page in PAGES if page.stem not in EXECUTED and commands(page)} - {
        page.stem for page in OFFLINE
    }
    assert left == {"adding-a-dataset", "adding-a-method", "adding-a-metric", "downstream", "ike", "real-models"}


@pytest.fixture(scope="module")
def given(tmp_path_factory, statistics) -> Path:
    """What pages take for granted: runs, facts, and models that other commands of theirs would write in minutes."""
    folder = tmp_path_factory.mktemp("given")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in ("evaluate method=memit", "evaluate method=emmet", "sequential method=memit"):
            run(partial(invoke, statistics), f"edit-cli {line} dataset=counterfact", statistics)
    for model in ("fact-model", "llama/tiny-llama"):
        shutil.copytree(ASSETS / "tiny-gpt2", folder / model)
    for name in ("records.json", "corpus.txt"):
        shutil.copy(ASSETS / "world" / name, folder / "fact-model" / name)
    (folder / "facts.jsonl").write_text(blocks(ROOT / "docs" / "datasets.md", "json")[0], encoding="utf-8")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", OFFLINE, ids=lambda page: page.stem)
def test_every_offline_command_of_a_page_runs_in_its_order(cli, statistics, given, tmp_path, monkeypatch, page):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))  # what is tuned here is found by no other test
    for there in given.iterdir():
        if any(re.search(rf"\b{there.name}\b", line) for line in OFFLINE[page]):
            (shutil.copytree if there.is_dir() else shutil.copy)(there, tmp_path / there.name)
    for line in OFFLINE[page]:
        run(cli, line, statistics)
