"""What is installed, and with which versions."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements() -> set[str]:
    listed = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["test"]
    return {normal(re.split(r"[^\w.-]", line)[0]) for line in listed}


def test_every_package_is_installed():
    found = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "edit_cli").rglob("__init__.py")}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found | {"edit_cli.conf"}


def test_every_dependency_has_a_tested_version():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    assert requirements() <= {normal(line.partition("==")[0]) for line in lines}
    assert "torch==2.13.0" in lines


def test_no_place_to_install_from_is_named():
    for name in ("pyproject.toml", "constraints.txt", "Makefile", ".ci/run"):
        assert not re.search(r"https?://|index-url|find-links", (ROOT / name).read_text()), name


def test_make_alone_lists_its_targets():
    shown = subprocess.run(
        ["make", "-C", str(ROOT), "--no-print-directory"], capture_output=True, text=True, check=True
    ).stdout
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"demo", "test", "test-slow", "tiny-model"} <= set(targets)
    assert all(f"make {target}" in shown for target in targets)
