"""An edit is the same bits whenever and wherever it is attached: again, to another copy of the model, in a new process.

Every method in every dtype; what is quick to make runs by default, the whole cross with the slow tests.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from embedded import requests, same_bits, snapshot
from learners import quick_editor

from edit_cli.config.catalog import names
from edit_cli.edits import store as edit_store
from edit_cli.lm.loading import ModelOptions
from edit_cli.lm.model import LM

pytestmark = pytest.mark.thin(3)

DTYPES = ("float32", "bfloat16", "float16")
# in the dtype with the fewest powers of two; tests/test_editors.py attaches every float32 edit again
QUICK = {(name, "float16") for name in ("defer", "ft", "grace", "lookup", "lora", "melo", "replay", "ultraedit")}
CROSS = [
    pytest.param(name, dtype, marks=() if (name, dtype) in QUICK else pytest.mark.slow)
    for name in names("method")
    for dtype in DTYPES
]


def load(dtype: Any) -> LM:
    return ModelOptions("tiny-gpt2", "embedded:tiny-gpt2", dtype=dtype, device="cpu").load()


@cache
def model(dtype: str) -> LM:
    return load(dtype)


@pytest.fixture(scope="module")
def elsewhere():
    """elsewhere(edit directory, dtype, pairs): what another process answers with the edit attached."""
    script = str(Path(__file__).with_name("elsewhere.py"))
    with subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        into, out = other.stdin, other.stdout
        assert into is not None and out is not None

        def ask(*question):
            into.write(json.dumps(question) + "\n")
            into.flush()
            return json.loads(out.readline())

        yield ask
        into.close()


def answers(lm: LM, pairs) -> list:
    return [[score.nll for score in lm.loglikelihood(pairs)], lm.generate([prompt for prompt, _ in pairs], 4)]


@pytest.mark.parametrize(("name", "dtype"), CROSS)
def test_attached_again_and_in_a_new_process_it_is_the_same_bits(name, dtype, statistics, elsewhere, tmp_path):
    lm, wanted = model(dtype), requests(2)
    pairs = [(r.text, target) for r in wanted for target in (r.target_new, r.target_true)]
    untouched, before = snapshot(lm), answers(lm, pairs)
    edit = quick_editor(statistics, name, [lm]).edit(lm, wanted)
    edit_store.save(edit, tmp_path / "edit", lm, wanted, {"name": name})
    with lm.edited(edit):
        first, bits, masters = answers(lm, pairs), snapshot(lm), dict(lm.masters)
    assert same_bits(snapshot(lm), untouched) and answers(lm, pairs) == before
    assert all(map(math.isfinite, first[0]))
    assert first != before or name in ("none", "rp", "serac")  # a few steps of training let nothing into a scope
    with lm.edited(edit):
        assert answers(lm, pairs) == first
    copy = load(dtype)
    edit_store.attach(tmp_path / "edit", copy)
    assert answers(copy, pairs) == first
    assert same_bits(snapshot(copy), bits) and same_bits(copy.masters, masters)
    copy.detach()
    assert same_bits(snapshot(copy), untouched)
    assert elsewhere(str(tmp_path / "edit"), dtype, pairs) == first
