"""Mixtures of experts: what stands beside the model works there, and whatever writes to a matrix says why it cannot."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from families import EXPERTS, quiet, tiny, tiny_lm, tokenizer
from transformers import AutoConfig

from edit_cli.editors.base import Editor
from edit_cli.editors.finetune.ft import FT, FTConfig
from edit_cli.editors.locate.rome import ROME
from edit_cli.editors.memory.grace import GRACE
from edit_cli.editors.memory.tpatcher import TPatcher
from edit_cli.editors.retrieval.ike import IKE
from edit_cli.editors.retrieval.lookup import Lookup
from edit_cli.editors.retrieval.serac import SERAC
from edit_cli.edits import store
from edit_cli.errors import UsageError
from edit_cli.lm.layout import LayoutOptions, discover
from edit_cli.requests import EditRequest
from edit_cli.statistics.corpora import EmbeddedText

FACTS = [EditRequest("{} lives in", "Ada Lund", "Paris"), EditRequest("The capital of {} is", "France", "Rome")]
ASKED = [(fact.text, fact.target_new) for fact in FACTS]
SHARED = {"qwen2_moe": "mlp.shared_expert.down_proj", "deepseek_v3": "mlp.shared_experts.down_proj"}
BESIDE: dict[type[Editor[Any]], dict[str, Any]] = {
    GRACE: {"layer": 1, "steps": 8, "lr": 1.0},
    TPatcher: {"corpus": EmbeddedText(), "memory_size": 60, "validation_size": 20, "steps": 15},
    Lookup: {},
    IKE: {"demonstrations": 0},
}


@cache
def mixture(family: str):
    return tiny_lm(family)


@pytest.mark.parametrize("family", EXPERTS)
def test_what_every_token_passes_is_found_beside_the_experts(family):
    layout = discover(tiny(family)[0])
    assert layout.has_experts
    last = layout.depth - 1
    if family in SHARED:
        assert layout.is_mixture(last) and layout.mlp(last).out == SHARED[family] and len(layout.mlp(last).ins) == 2
    elif family == "jamba":  # every other block is dense
        assert [layout.is_mixture(layer) for layer in range(3)] == [False, True, False]
    else:
        with pytest.raises(UsageError, match="without an MLP that every token passes"):
            layout.mlp_out(last)


@pytest.mark.parametrize(
    ("family", "editor"),
    [(family, editor) for family in ("mixtral", "olmoe") for editor in (GRACE, Lookup, IKE)]
    + [("qwen2_moe", editor) for editor in BESIDE],
)
def test_what_stands_beside_the_model_is_attached_and_comes_off(family, editor, tmp_path):
    lm = mixture(family)
    bits, before = lm.fingerprint(lm.weight_names), [score.nll for score in lm.loglikelihood(ASKED)]
    edit = editor(editor.Config(**BESIDE[editor]), lm).edit(FACTS)
    store.save(edit, tmp_path / "edit", lm, FACTS, {"name": editor.__name__.lower()})
    with lm.edited(edit):
        after = [score.nll for score in lm.loglikelihood(ASKED)]
    with lm.edited(store.load(tmp_path / "edit", lm)):
        assert [score.nll for score in lm.loglikelihood(ASKED)] == after
    assert after != before and (editor is IKE or after[0] < before[0])
    assert [score.nll for score in lm.loglikelihood(ASKED)] == before
    assert lm.fingerprint(lm.weight_names) == bits


def test_without_a_shared_module_neurons_have_no_place():
    with pytest.raises(UsageError, match=r"layer 2 is a mixture of experts without an MLP .*another method \(grace\)"):
        TPatcher(TPatcher.Config(**BESIDE[TPatcher]), mixture("mixtral"))


@pytest.mark.parametrize("editor", [ROME, FT])
def test_weight_editors_say_why_they_cannot_be_right(editor):
    settings = ROME.Config(layers=[1]) if editor is ROME else FTConfig(layers=[1])
    with pytest.raises(UsageError, match=r"mixture of experts: which matrix a key reaches .*routing.*model\.id"):
        editor(settings, mixture("qwen2_moe"))
    assert SERAC.experts and not editor.experts


def test_a_named_projection_of_an_expert_changes_nothing():
    layout = discover(tiny("mixtral")[0], LayoutOptions(blocks="model.layers", final_norm="model.norm"))
    with pytest.raises(UsageError, match="mixture of experts"):
        layout.refuse_experts("ROME", "mixtral")


def test_a_mixture_is_refused_before_it_is_loaded(cli, tmp_path):
    """Its weights are not even there."""
    with quiet():
        AutoConfig.for_model("mixtral", **EXPERTS["mixtral"], vocab_size=340).save_pretrained(tmp_path / "mix")
    tokenizer().save_pretrained(tmp_path / "mix")
    fact = "edit.prompt={} lives in", "edit.subject=Ada", "edit.target=Paris"
    for method in ("rome", "ft"):
        ended = cli("edit", f"method={method}", "model=hf", f"model.id={tmp_path / 'mix'}", "method.layers=[1]", *fact)
        assert ended.code == 2 and "a mixture of experts: which matrix" in ended.err and "grace" in ended.err
    ended = cli("trace", "model=hf", f"model.id={tmp_path / 'mix'}", "model.records=world", "limit=1")
    assert ended.code == 2 and "tracing cannot be right on mix, a mixture of experts" in ended.err
