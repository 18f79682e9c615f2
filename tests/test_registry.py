"""What lies on disk names classes by names that outlive moves in the code, and code comes from nowhere but here and
plug-ins.
"""

from __future__ import annotations

import inspect
import json
import re
from importlib import import_module
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from edit_cli.config import catalog, registry
from edit_cli.config.build import target_class
from edit_cli.edits.edit import Edit
from edit_cli.errors import MissingError, UsageError

KNOWN = [path.replace(":", ".") for names in registry.BUILT_IN.values() for path in names.values()]


def kinds(cls: type = Edit) -> set[type]:
    """All kinds of edits that can be made, whose modules are imported."""
    found = {cls} if not inspect.isabstract(cls) and cls.__module__.startswith("edit_cli.") else set()
    return found.union(*map(kinds, cls.__subclasses__()))


def test_every_class_of_a_configuration_has_a_name_of_its_own():
    texts = [file.read_text(encoding="utf-8") for file in catalog.conf_dir().rglob("*.yaml")]
    targets = {found for text in texts for found in re.findall(r"_target_: (\S+)", text)}
    assert len(targets) > 40
    assert targets <= set(KNOWN)
    assert len(KNOWN) == len(set(KNOWN))
    for target in targets:
        cls = target_class(OmegaConf.create({"_target_": target}))
        assert registry.name_of(cls) == registry.name_of(target) and "." not in registry.name_of(cls)


def test_every_kind_of_edit_has_a_name():
    for path in registry.BUILT_IN[registry.METHODS].values():
        import_module(path.partition(":")[0])
    named = {cls for cls in kinds() if cls.__name__ != "Joined"}  # which is never saved by itself
    assert {registry.edit_class(name, "here") for name in registry.BUILT_IN[registry.EDITS]} == named
    assert all(registry.edit_class(registry.edit_name(cls), "here") is cls for cls in named)


def test_no_setting_is_called_like_the_name_of_its_class():
    for path in KNOWN:
        module, _, name = path.rpartition(".")
        cls = getattr(import_module(module), name)
        assert registry.TYPE not in getattr(getattr(cls, "Config", cls), "__dataclass_fields__", {}), path


def test_paths_become_names_at_every_depth():
    node = {"_target_": "edit_cli.editors.locate.memit.MEMIT", "stats": {"_target_": KNOWN[-1], "n": [1, {"a": 2}]}}
    assert registry.without_paths(node) == {
        "type": "memit",
        "stats": {"type": registry.name_of(KNOWN[-1]), "n": [1, {"a": 2}]},
    }
    assert registry.without_paths({"_target_": "away.deep.Mine"}) == {"type": "away/Mine"}


def test_files_of_a_run_hold_no_path_of_code(cli):
    ended = cli("edit", "method=memit", "edit.prompt={} plays the", "edit.subject=Jormia Stenenen",
                "edit.target=organ", "run_dir=r", quick=True)  # fmt: skip
    assert ended.code == 0, ended.err
    for file in ("manifest.json", "edits/0000/edit.json", "summary.json", "results.jsonl"):
        text = Path("r", file).read_text(encoding="utf-8")
        assert "edit_cli" not in text and "_target_" not in text
    assert json.loads(Path("r/manifest.json").read_text())["config"]["method"]["type"] == "memit"
    saved = json.loads(Path("r/edits/0000/edit.json").read_text())
    assert (saved["format"], saved["type"], saved["method"]["type"]) == (2, "weights", "memit")


def test_older_files_are_told_in_a_line(cli):
    assert cli("edit", "method=ft", "method.steps=1", "edit.prompt=Paris is in", "edit.target=Peru", "run_dir=r",
               quick=True).code == 0  # fmt: skip
    for file, command in (("manifest.json", ("show", "r")), ("edits/0000/edit.json", ("apply", "r", "--out", "o"))):
        path = Path("r", file)
        path.write_text(json.dumps({**json.loads(path.read_text()), "format": 1}))
        ended = cli(*command)
        assert (ended.code, len(ended.err.strip().splitlines())) == (3, 1)
        assert file in ended.err and "format 2 is what this version reads" in ended.err


def test_only_what_the_user_named_is_imported(tmp_path, monkeypatch):
    package = tmp_path / "planted"
    package.mkdir()
    (package / "__init__.py").write_text("from subprocess import Popen\nraised = 1\n")
    (package / "inner.py").write_text("raise SystemError('code was run')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for path in ("planted.inner.Mine", "os.system", "planted.Popen", "Mine", ""):
        with pytest.raises(UsageError, match="only classes inside edit_cli and of plug-ins"):
            registry.target(path, "method._target_")
    try:
        registry.admit(["planted"])
        for path in ("planted.Popen", "planted.raised", "planted.nothing.Mine"):
            with pytest.raises(UsageError, match="there is no such class"):
                registry.target(path, "method._target_")
        with pytest.raises(MissingError, match="edits of the kind 'planted.inner:Mine' are not known"):
            registry.edit_class("planted.inner:Mine", "edit")
    finally:
        registry.admit(())
    with pytest.raises(UsageError, match="only classes inside edit_cli"):
        registry.target("planted.Popen", "method._target_")


@pytest.mark.parametrize("name", ["no-name", "a.b", "nowhere_to_be_found", ""])
def test_packages_that_are_none_are_told(name):
    with pytest.raises(UsageError, match=r"plugins=\["):
        registry.admit([name])
    assert registry.admitted() == ()
