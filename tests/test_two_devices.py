"""Models on several devices, and on one with weights in host memory: a made-up device refuses what a real one
refuses.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from two_devices import PLACES

METHODS = ["memit", "rome", "pmet", "ft", "ultraedit", "lookup"]
ALL = [(title, method) for title in PLACES for method in METHODS]
FEW = [  # of each kind of place one; all pairs take minutes
    (title, method) for title, method in zip(PLACES, METHODS, strict=True) if method == "memit"
]


def outcomes(folder: Path, pairs: list[tuple[str, str]]) -> dict:
    """What the script says; a device can be made up only once a process."""
    script = Path(__file__).parent / "two_devices.py"
    command = [sys.executable, str(script), str(folder), json.dumps(pairs)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=one_thread)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    return outcomes(tmp_path_factory.mktemp("statistics"), FEW)


@pytest.fixture(scope="module")
def found_of_all(tmp_path_factory) -> dict:
    return outcomes(tmp_path_factory.mktemp("statistics"), ALL)


@pytest.mark.parametrize("title", [title for title, _ in FEW])
def test_the_model_lies_and_computes_where_it_is_told(found, title):
    lies_and_computes_where_it_is_told(found, title)


@pytest.mark.slow
@pytest.mark.parametrize("title", PLACES)
def test_so_does_every_other(found_of_all, title):
    lies_and_computes_where_it_is_told(found_of_all, title)


def lies_and_computes_where_it_is_told(found: dict, title: str) -> None:
    there, main = PLACES[title]
    placed = found["placed"][title]
    assert placed["devices"] == sorted({"twin:0", main})
    assert placed["input"] == ("twin:0" if main == "twin:0" or "transformer.wte" in there else "cpu")


@pytest.mark.parametrize(("title", "method"), FEW)
def test_an_edit_is_that_of_the_model_on_one_device(found, title, method):
    is_that_of_one_device(found, title, method)


@pytest.mark.slow
@pytest.mark.parametrize(("title", "method"), ALL)
def test_so_is_every_other(found_of_all, title, method):
    is_that_of_one_device(found_of_all, title, method)


def is_that_of_one_device(found: dict, title: str, method: str) -> None:
    mine, plain = found["placed"][title]["methods"][method], found["plain"][method]
    assert mine["undone"]
    assert mine["weights"] == plain["weights"]
    for moment in ("before", "after"):
        assert mine[moment][0] == pytest.approx(plain[moment][0], abs=1e-4)
        assert mine[moment][1] == plain[moment][1]
    assert mine["before"] != mine["after"]
    assert mine["norms"] == pytest.approx(plain["norms"], rel=1e-4)
