"""The house rules that a reader relies on, read from the code itself."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "edit_cli"

# A module imports only from rows above its own, or from its own row.
FLOORS = [
    {"errors", "wording", "__init__"},
    {"assets", "config", "distributed", "files", "monitor", "requests", "terminal", "writing"},
    {"lm"},
    {"edits"},
    {"runs", "statistics", "metrics", "datasets"},
    {"editors", "inspection", "tracing", "training", "tuning"},
    {"report", "console", "streams"},
    {"experiment"},
    {"commands"},
    {"cli", "testing", "api", "__main__"},
]
APART = {"conf"}  # the YAML folder
ONLY_IN = {
    "hydra": {"cli", "config", "testing"},
    "omegaconf": {"cli", "config"},
    "rich": {"console", "report", "experiment", "commands"},
    "typer": {"cli"},
    "accelerate": {"distributed", "training"},
    "matplotlib": {"report"},
    "jinja2": {"report"},
    "optuna": {"tuning"},
}


def part(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(path: Path) -> set[str]:
    """Modules imported anywhere in the file, for type checking alone, too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES or node.module == "edit_cli" else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


DOOR = PACKAGE / "__init__.py"  # imports nothing before it is asked for it (tests/test_api.py)
FILES = sorted({*PACKAGE.rglob("*.py")} - {DOOR})
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}


def floor(name: str) -> int:
    return next(number for number, names in enumerate(FLOORS) if name in names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    here = part(path)
    for module in imports(path):
        top, _, rest = module.partition(".")
        if top == "edit_cli" and here not in APART:
            there = rest.split(".")[0] or "__init__"
            there = there if there != "__version__" else "__init__"
            if there not in APART:
                assert floor(there) <= floor(here), f"{here} imports {there}"
        if top in ONLY_IN:
            assert here in ONLY_IN[top], f"{top} is imported in {here}"


def test_no_modules_import_each_other_in_a_circle():
    """Not by way of others, of imports inside functions or for type checking, either: whatever imports nothing that is
    left is taken away, until nothing is.
    """
    left = {name: imports(path) & MODULES.keys() - {name} for name, path in MODULES.items()}
    while leaves := {name for name, needed in left.items() if not needed & left.keys()}:
        left = {name: needed for name, needed in left.items() if name not in leaves}
    while tips := left.keys() - set().union(*left.values()):  # what only imports a circle is not in it
        left = {name: needed for name, needed in left.items() if name not in tips}
    assert not {name: sorted(needed & left.keys()) for name, needed in left.items()}


def test_methods_do_not_import_each_other():
    """But for MEMIT, whose algorithm its family changes one step of, and SERAC, of which RP is an ablation."""
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "conf" / "method").glob("*.yaml")]
    methods = {
        found for text in texts for found in re.findall(r"^_target_: (edit_cli\.editors\.\S+)\.\w+$", text, re.M)
    }
    assert len(methods) >= 20
    for method in methods:
        others = imports(ROOT / f"{method.replace('.', '/')}.py") & methods
        allowed = {"edit_cli.editors.locate.memit", "edit_cli.editors.retrieval.serac"}
        assert others <= allowed, f"{method} imports {others}"


def test_no_pickle_and_no_remote_code():
    for path in FILES:
        text = ast.unparse(ast.parse(path.read_text(encoding="utf-8")))
        assert not re.search(
            r"import pickle|pickle\.(load|dump)|torch\.load\(|trust_remote_code *= *True|shell=True", text
        ), path


def test_no_model_names_in_shared_code():
    """What a family is like is found out by looking at its modules, never from its name."""
    for path in FILES:
        if part(path) in {"lm", "edits", "editors", "metrics", "statistics", "experiment", "commands"}:
            code = ast.unparse(ast.parse(path.read_text(encoding="utf-8")))
            assert not re.search(r"model_type *(==|in)|['\"](gpt2|gpt-j|llama|mistral|qwen|bert|bart|t5\b)", code), path
            # there: what kind of head was saved
            assert path.name in {"kinds.py", "files.py"} or not re.search(r"architectures\b", code), path


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("edit_cli.cli.main", ["torch", "transformers", "hydra", "datasets", "scipy"]),
        # what takes seconds is imported once the monitor says what is going on
        ("edit_cli.experiment.execute", ["torch", "transformers", "datasets", "scipy", "matplotlib"]),
        ("edit_cli.cli.hydra_launch", ["torch", "transformers", "datasets", "scipy", "matplotlib"]),
    ],
)
def test_nothing_heavy_is_imported_for_help_or_before_the_first_word(module, heavy):
    code = f"import sys; import {module}; print(sorted({set(heavy)} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
