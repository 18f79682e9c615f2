"""Fixtures for the tests of commands: the command line, run in this process, in an empty folder."""

from __future__ import annotations

import gc
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, before torch is loaded

QUICK = ("protocol.observe.sample=false", "protocol.observe.max_new_tokens=3", "model.device=cpu")
FEW_LINES = "few lines.txt"


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def last(self) -> str:
        return self.out.rstrip().splitlines()[-1]

    @property
    def words(self) -> str:
        """Standard output without its line breaks."""
        return " ".join(self.out.split())

    @property
    def error(self) -> str:
        """The one line that says what is wrong; on a slow machine lines of progress come before it."""
        (line,) = [line for line in self.err.splitlines() if line.startswith("error: ")]
        return line


Cli = Callable[..., Ended]


@pytest.hookimpl(tryfirst=True)  # before those that are slow are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a parametrized test marked `thin(n)` every n-th combination is run by default; all of them are by `make
    test-slow`. Tests begin at different ones, so that together they meet every method and model.
    """
    met: Counter[str] = Counter()
    for item in items:
        thin = item.get_closest_marker("thin")
        if thin is None or not hasattr(item, "callspec"):
            continue
        test = item.nodeid.partition("[")[0]
        if (crc32(test.encode()) + met[test]) % thin.args[0]:
            item.add_marker(pytest.mark.slow)
        met[test] += 1


def pytest_collection_finish() -> None:
    """What was imported stays: a search for garbage need not walk it again and again (a fifth of the suite's time)."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> Path:
    """Second moments are computed once for all tests, and never in the user's cache; with it lies a text that is read
    quickly.
    """
    from edit_cli.assets import FOLDER

    folder = tmp_path_factory.mktemp("cache")
    (folder / FEW_LINES).write_text("\n".join((FOLDER / "world" / "heldout.txt").read_text().splitlines()[:4]))
    return folder


@pytest.fixture(scope="session", autouse=True)
def no_settings_of_the_user(tmp_path_factory):
    """What the user's own searches found is in no test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        yield


def invoke(cache_dir: Path, *arguments: str, quick: bool = False) -> Ended:
    """Run `edit-cli ARGUMENTS` in the present folder. quick: with settings that make runs small."""
    from typer.testing import CliRunner

    from edit_cli.cli.main import app

    small = (*QUICK, f"cache_dir={cache_dir}", "stats.documents=40") if quick else ()
    if quick and not any(argument.startswith("figures=") for argument in arguments):
        small = (*small, "figures=false")
    if quick and not any(argument.startswith(("model=", "model.perplexity_text=")) for argument in arguments):
        small = (*small, f"model.perplexity_text={cache_dir / FEW_LINES}")
    result = CliRunner().invoke(app, [*arguments, *small], prog_name="edit-cli")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Ended(result.exit_code, result.stdout, result.stderr)


@pytest.fixture
def cli(tmp_path, monkeypatch, cache_dir) -> Cli:
    """Run commands in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return partial(invoke, cache_dir)


@pytest.fixture(scope="module")
def finished(request, tmp_path_factory, cache_dir) -> tuple[Ended, Path]:
    """How the module's `FINISHED` command ended, which is run once, and the folder where."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("COLUMNS", "100")
        return invoke(cache_dir, *request.module.FINISHED, quick=True), folder


@pytest.fixture
def look(finished, monkeypatch, cache_dir) -> Cli:
    """Run commands where `FINISHED` ran. They must leave its run as it is."""
    monkeypatch.chdir(finished[1])
    monkeypatch.setenv("COLUMNS", "100")
    return partial(invoke, cache_dir)


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def exact(run: Path) -> list[dict[str, Any]]:
    """The lines of a run without what depends on the clock."""
    lines = json_lines(run / "results.jsonl")
    return [{key: value for key, value in line.items() if key not in ("seconds", "phases")} for line in lines]


def observations(run: Path) -> list[dict[str, Any]]:
    """The lines of a run without what depends on the clock; numbers as far as they do not hang on what else was in
    the batch.
    """
    return [nearly(line) for line in exact(run)]


def nearly(value: Any) -> Any:
    """`value`, equal to anything whose numbers are close to its own."""
    if isinstance(value, dict):
        return {key: nearly(part) for key, part in value.items()}
    if isinstance(value, list):
        return [nearly(part) for part in value]
    return pytest.approx(value, rel=1e-3, abs=1e-3) if isinstance(value, float) else value


class Killed(BaseException):
    """Stands for kill -9 within the process: nothing of the package catches it."""


@pytest.fixture
def kill_after(monkeypatch) -> Callable[[int], None]:
    """Make the process end right after the n-th line of results has been written from now on."""
    from edit_cli.runs.run import Run

    real = Run.append

    def arm(lines: int) -> None:
        left = lines

        def append(self: Run, line: Any) -> None:
            nonlocal left
            real(self, line)
            left -= 1
            if left == 0:
                monkeypatch.setattr(Run, "append", real)
                raise Killed

        monkeypatch.setattr(Run, "append", append)

    return arm


@pytest.fixture(scope="module")
def statistics(tmp_path_factory) -> Path:
    """A cache folder for second moments."""
    return tmp_path_factory.mktemp("statistics")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Write rows as JSON lines, or another value as JSON; returns the path."""

    def written(rows: Any, name: str = "data.jsonl") -> str:
        text = (
            rows
            if isinstance(rows, str)
            else json.dumps(rows)
            if name.endswith(".json")
            else "\n".join(map(json.dumps, rows))
        )
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return written
