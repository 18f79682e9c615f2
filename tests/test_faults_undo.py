"""Every method that writes weights, on ten families and in every dtype: what it did comes off again, bit for bit."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from embedded import same_bits, snapshot
from families import tiny_lm

from edit_cli.editors.base import Editor
from edit_cli.editors.finetune.ft import FT
from edit_cli.editors.locate.alphaedit import AlphaEdit
from edit_cli.editors.locate.base import LocateEditor
from edit_cli.editors.locate.blue import BLUE
from edit_cli.editors.locate.context_prefixes import ContextConfig
from edit_cli.editors.locate.emmet import EMMET
from edit_cli.editors.locate.memit import MEMIT
from edit_cli.editors.locate.memit_merge import MEMITMerge
from edit_cli.editors.locate.pmet import PMET
from edit_cli.editors.locate.rome import ROME
from edit_cli.editors.locate.ultraedit import UltraEdit
from edit_cli.editors.locate.value_batch import ValueConfig
from edit_cli.edits.edit import WeightDelta
from edit_cli.lm.model import LM
from edit_cli.requests import EditRequest
from edit_cli.statistics.corpora import EmbeddedText
from edit_cli.statistics.moments import MomentStore

pytestmark = pytest.mark.faults

FAMILIES = ("gpt2", "gptj", "gpt_neo", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "phi", "opt")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
METHODS: dict[type[Editor[Any]], dict[str, Any]] = {
    ROME: {"layers": [1], "value": {"steps": 3}},
    MEMIT: {"layers": [0, 1], "covariance_weight": 1.0, "value": {"steps": 3}},
    EMMET: {"layers": [1], "value": {"steps": 3}},
    PMET: {"layers": [0, 1], "value": {"steps": 3}},
    BLUE: {"layers": [0, 1], "value": {"steps": 3}},
    MEMITMerge: {"layers": [0, 1], "value": {"steps": 3}},
    AlphaEdit: {"layers": [0, 1], "relative": True, "threshold": 0.5, "value": {"steps": 3}},
    UltraEdit: {"modules": ["mlp_out:0-1"], "lr": 1e-2, "begin_with": 0},
    FT: {"layers": [1], "steps": 3, "lr": 1e-3},
}
REQUESTS = [
    EditRequest("{} lives in", "Ada Lund", "Oslo"),
    EditRequest("The capital of {} is", "France", "Marlow"),
    EditRequest("{} plays the", "Zoë", "violin"),
]


@cache
def model(family: str, dtype: torch.dtype) -> LM:
    lm = tiny_lm(family)
    lm.model.to(dtype)
    return lm


@pytest.fixture(scope="module")
def moments(tmp_path_factory) -> MomentStore:
    return MomentStore(corpus=EmbeddedText(), tokens=400, cache_dir=str(tmp_path_factory.mktemp("moments")))


def begun(method: type[Editor[Any]], lm: LM, moments: MomentStore) -> Editor[Any]:
    settings = dict(METHODS[method])
    if issubclass(method, LocateEditor):
        settings |= {"moments": moments, "value": ValueConfig(**settings["value"])}
        settings["context"] = ContextConfig(prefixes=["", "I said so. "])
    return method(method.Config(**settings), lm)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_what_was_written_comes_off_bit_for_bit(method, family, dtype, moments):
    lm = model(family, dtype)
    untouched, texts = snapshot(lm), [(request.text, request.target_new) for request in REQUESTS]
    before = [score.nll for score in lm.loglikelihood(texts)]
    first = begun(method, lm, moments).edit(REQUESTS[:2])
    assert isinstance(first, WeightDelta) and same_bits(snapshot(lm), untouched)  # making it left the model alone
    lm.attach(first)
    one = snapshot(lm)
    assert not same_bits(one, untouched)
    second = begun(method, lm, moments).edit(REQUESTS[2:])
    lm.attach(second)
    lm.detach()
    assert same_bits(snapshot(lm), one)
    lm.detach()
    assert same_bits(snapshot(lm), untouched)
    assert [score.nll for score in lm.loglikelihood(texts)] == before


def test_every_method_of_the_family_is_among_them():
    """A new one shows up here. Fine-tuning's others (EWC, replay, retraining) write by the same code as FT."""
    for file in ("rome", "memit", "emmet", "pmet", "blue", "memit_merge", "alphaedit"):
        assert any(cls.__module__.endswith(f".{file}") for cls in METHODS)
    assert {cls.__name__ for cls in _below(LocateEditor)} == {cls.__name__ for cls in METHODS} - {"FT", "UltraEdit"}


def _below(cls: type) -> set[type]:
    found: set[type] = set()
    child: type
    for child in cls.__subclasses__():
        found |= {child} | _below(child)
    return found
