"""The embedded model and records of its world, for the tests that need a model which knows facts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from hydra import compose, initialize_config_module
from transformers import LlamaConfig, LlamaForCausalLM

from edit_cli.config.build import register_resolvers
from edit_cli.editors.base import Context, Editor, Examples, Method
from edit_cli.edits.edit import Edit
from edit_cli.experiment.setup import method_of
from edit_cli.lm.model import LM
from edit_cli.requests import EditRequest
from edit_cli.testing import embedded_lm, linear_twin, same_bits, snapshot
from edit_cli.testing import facts as requests
from edit_cli.testing.parts import world

__all__ = ["embedded_lm", "linear_twin", "requests", "same_bits", "snapshot", "world"]  # from here, for all tests

# Methods that are held to the same bits wherever a model's weights lie, and in few bits.
METHODS = [
    "alphaedit",
    "blue",
    "emmet",
    "ft",
    "ft-l",
    "lookup",
    "memit",
    "memit-merge",
    "pmet",
    "r-rome",
    "rome",
    "ultraedit",
]


class Prepared:
    """A method with its settings, begun on each model that it is asked to edit. `reset` ends what was begun; what is
    computed once a model stays.
    """

    def __init__(self, method: Method, examples: Examples | None = None) -> None:
        self.method = method
        self.config: Any = method.config
        self.examples = examples
        self._contexts: WeakKeyDictionary[LM, Context] = WeakKeyDictionary()
        self._begun: WeakKeyDictionary[LM, Editor[Any]] = WeakKeyDictionary()

    def context(self, lm: LM) -> Context:
        context = self._contexts.setdefault(lm, Context())
        context.examples = self.examples
        return context

    def on(self, lm: LM) -> Any:
        """The editor at work on that model."""
        context = self.context(lm)
        if lm not in self._begun:
            self._begun[lm] = self.method.begin(lm, context)
        return self._begun[lm]

    def edit(self, lm: LM, wanted: Sequence[EditRequest]) -> Any:
        return self.on(lm).edit(wanted)

    def check(self, lm: LM, request: EditRequest) -> None:
        self.on(lm).check(request)

    def warm_up(self, lm: LM) -> None:
        self.on(lm).warm_up()

    def recall(self, lm: LM, edit: Edit) -> None:
        self.on(lm).recall(edit)

    def figures(self, lm: LM, wanted: Sequence[EditRequest]) -> dict[str, dict[str, Any]]:
        return self.on(lm).figures(wanted)

    def reset(self) -> None:
        self._begun.clear()


def prepared(editor: type[Editor[Any]], **settings: Any) -> Prepared:
    """The method of that editor with these settings."""
    return Prepared(Method(editor, editor.Config(**settings)))


def packaged_editor(cache_dir: Path, name: str, *overrides: str) -> Prepared:
    """As the command line would build it for the embedded model, with few tokens of statistics, kept in `cache_dir`.

    UltraEdit goes without training records, of which these tests have none.
    """
    register_resolvers()
    overrides = (*(["method.begin_with=0"] if name == "ultraedit" else []), *overrides)
    with initialize_config_module("edit_cli.conf", version_base="1.3"):
        config = compose("evaluate", [f"method={name}", f"cache_dir={cache_dir}", "stats.tokens=6000", *overrides])
    return Prepared(method_of(config.method))


def answers(lm: LM, wanted: list[EditRequest]) -> tuple[list[float], list[str]]:
    """(−log P of the new answers, what it writes)."""
    scores = lm.loglikelihood([(request.text, request.target_new) for request in wanted])
    return [score.nll for score in scores], lm.generate([request.text for request in wanted], 4)


def random_llama(name: str, tokenizer: Any = None) -> LM:
    """A small Llama at random, with the words of the embedded GPT-2 unless others are given."""
    torch.manual_seed(1)
    tokenizer = tokenizer or embedded_lm().tokenizer
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return LM(LlamaForCausalLM(config), tokenizer, name)
