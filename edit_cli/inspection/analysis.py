"""One model, one text, and an edit where there is one: all that `inspect` finds, as plain lines."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edit_cli.errors import MissingError, UsageError
from edit_cli.inspection.changes import Change, Subject, changes, line_of, told_others
from edit_cli.inspection.layers import answers, measured, settled, values_of
from edit_cli.inspection.patterns import background, pattern, removals
from edit_cli.inspection.prefixes import Prefix, Prefixes
from edit_cli.inspection.settings import InspectOptions
from edit_cli.inspection.triggers import Triggers
from edit_cli.inspection.vocabulary import Tops, Vocabulary
from edit_cli.lm.layout import Layout
from edit_cli.lm.model import LM
from edit_cli.wording import many

DIGITS = 6  # of numbers in lines
Line = dict[str, Any]


class Inspection:
    """edits: directories of what is attached one after another, which the setting `named` names. limit: documents to
    read at most. documents: how many there will be, if known.
    """

    def __init__(
        self,
        lm: LM,
        options: InspectOptions,
        edits: Sequence[Path] = (),
        named: str = "",
        limit: int | None = None,
        documents: int | None = None,
    ) -> None:
        self.lm, self.options, self.edits, self.named = lm, options, edits, named
        self.documents = documents
        self.layers = layers_of(options, lm.layout)
        self.keys = keys_of(options, {layer: lm.key_width(layer) for layer in self.layers})
        self.vocabulary = Vocabulary(lm, options.norm)
        self.prefixes = Prefixes(lm, options, limit)

    def lines(self) -> Iterator[Line]:
        """Keys and layers from below upwards, then the layers that the edit has changed.

        Raises:
            UsageError, MissingError: as `changes` and `Triggers.read`; too few prefixes for what is asked.
        """
        facts, changed, others = self._changes()
        if others:
            self.lm.monitor.note(told_others(others))
        triggers = Triggers(self.lm, self.keys, {change.layer: change.right for change in changed}, self.prefixes)
        with self.lm.monitor.phase("triggers"), self.lm.monitor.task("documents", self.documents) as advance:
            triggers.read(advance)
        self._refuse_too_few()
        yield from self._layers(triggers)
        for change in changed:
            found = triggers.directed[change.layer]
            texts = [
                [(self._text(self.prefixes.at(place)), score) for place, score in self._pairs(places, scores)]
                for places, scores in zip(found.places[:, : self.options.shown], found.scores, strict=True)
            ]
            about = line_of(self.lm, change, facts, self.vocabulary, self.options.shown, texts)
            yield _rounded({"what": "edit", "layer": change.layer, "key": None, **about})

    def _changes(self) -> tuple[list[Subject], list[Change], list[str]]:
        if not self.edits:
            return [], [], []
        with self.lm.monitor.phase("edit"):
            return changes(self.lm, self.edits, self.named, self.options.facts)

    def _refuse_too_few(self) -> None:
        """Raises:
        MissingError: no prefix. UsageError: fewer than the triggers that are wanted.
        """
        corpus, options, count = self.options.corpus, self.options, self.prefixes.count
        if not count:
            raise MissingError(
                f"corpus {corpus.label} has no sentence of {many(options.shortest, 'token')}: give more text"
                " (corpus=file corpus.path=FILE), or lower protocol.shortest"
            )
        if count < options.examples:
            there = many(count, "prefix", "prefixes")
            raise UsageError(
                f"protocol.examples={options.examples}: corpus {corpus.label} has only {there} to choose from; lower"
                " it, raise limit, or give more text (corpus=file corpus.path=FILE)"
            )

    def _layers(self, triggers: Triggers) -> Iterator[Line]:
        lm = self.lm
        sample = [self.prefixes.at(place) for place in sorted(triggers.sample.places)]
        usual = background(self._text(prefix) for prefix in sample)
        with lm.monitor.phase("values"):
            tops = {
                layer: self.vocabulary.tops(values_of(lm, layer))
                for layer in _counted(lm, "values, layer by layer", self.layers)
            }
        with lm.monitor.phase("layers"):
            final = answers(lm, sample)
            found = list(
                _counted(lm, "layers", measured(lm, self.layers, sample, tops, self.vocabulary), len(self.layers))
            )
        refined = settled([one.residual for one in found], final)
        for layer, one, more in _counted(
            lm, "keys, layer by layer", zip(self.layers, found, refined, strict=True), len(self.layers)
        ):
            yield from self._keys(layer, triggers, tops[layer], usual)
            about = {
                **self._agreement(layer, triggers, tops[layer]),
                "top_share": tops[layer].share.mean().item(),
                "composition": one.composition,
                "refinement": {**one.refinement, **more},
                "documents": self.prefixes.documents,
                "prefixes": self.prefixes.count,
                "measured": len(sample),
            }
            yield _rounded({"what": "layer", "layer": layer, "key": None, **about})

    def _agreement(self, layer: int, triggers: Triggers, tops: Tops) -> dict[str, Any]:
        """Over all keys of a layer that fire: how often the value's top token is the next one of the strongest
        trigger, and how often it would be if values and triggers were dealt out anew.
        """
        every = triggers.every[layer]
        fired = every.scores[:, 0] > 0
        following = [self.prefixes.at(place).next for place in every.places[:, 0].tolist()]
        pairs = [
            (top, after)
            for top, after, fires in zip(tops.up.tolist(), following, fired.tolist(), strict=True)
            if fires and after is not None
        ]
        size, tokens = len(pairs), len(self.vocabulary.weight)
        counted = [torch.tensor(part).bincount(minlength=tokens).double() / size for part in zip(*pairs, strict=True)]
        return {
            "keys": len(every.scores),
            "silent": int((~fired).sum()),
            "compared": size,
            "agreement": sum(top == after for top, after in pairs) / size if size else None,
            "chance": float(counted[0] @ counted[1]) if size else None,
        }

    def _keys(self, layer: int, triggers: Triggers, tops: Tops, usual: Mapping[str, float]) -> Iterator[Line]:
        lm, options, drawn = self.lm, self.options, triggers.drawn[layer]
        values = values_of(lm, layer)
        found = [
            [(self.prefixes.at(place), score) for place, score in self._pairs(places, scores) if score > 0]
            for places, scores in zip(drawn.places, drawn.scores, strict=True)
        ]
        with lm.monitor.phase("removals"):
            wanted = [(key, some[: options.ablated]) for key, some in zip(self.keys[layer], found, strict=True)]
            removed = removals(lm, layer, wanted, options.seed)
        for key, some, change in zip(self.keys[layer], found, removed, strict=True):
            following = [prefix.next for prefix, _ in some]
            known = [token for token in following if token is not None]
            top = int(tops.up[key])
            yield _rounded({
                "what": "key",
                "layer": layer,
                "key": key,
                "examples": [
                    {
                        "text": self._text(prefix),
                        "last": self._decode(prefix.ids[-1:]),
                        "next": None if prefix.next is None else self._decode([prefix.next]),
                        "coefficient": score,
                        "document": prefix.document,
                    }
                    for prefix, score in some
                ],
                "pattern": pattern([prefix for prefix, _ in some], self._decode, usual) if some else None,
                "removed": change,
                "value": {
                    "tokens": self.vocabulary.told(values[key], options.shown),
                    "agrees": None if not following or following[0] is None else following[0] == top,
                    "ranks": self.vocabulary.ranks(values[key], known) if known else [],
                },
            })  # fmt: skip

    @staticmethod
    def _pairs(places: Tensor, scores: Tensor) -> list[tuple[int, float]]:
        return list(zip(places.tolist(), scores.tolist(), strict=False))

    def _decode(self, ids: Sequence[int]) -> str:
        return self.lm.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)

    def _text(self, prefix: Prefix) -> str:
        return self._decode(prefix.ids)


def layers_of(options: InspectOptions, layout: Layout) -> list[int]:
    """The layers to look at, in order.

    Raises:
        UsageError: the model lacks one; says which it has.
    """
    asked = options.layers if options.layers is not None else sorted(options.chosen) or range(layout.depth)
    for layer in asked:
        if layer >= layout.depth:
            name = "layers" if options.layers is not None else "named"
            raise UsageError(
                f"protocol.{name}: layer {layer} does not exist, this model has layers 0 to {layout.depth - 1}"
            )
    return sorted(asked)


def keys_of(options: InspectOptions, widths: Mapping[int, int]) -> dict[int, list[int]]:
    """{layer: its keys whose triggers are kept}: the named ones, or drawn ones.

    Raises:
        UsageError: a layer has fewer keys.
    """
    found = {}
    for layer, width in widths.items():
        if options.named is not None:
            found[layer] = options.chosen.get(layer, [])
            wrong = [key for key in found[layer] if key >= width]
            if wrong:
                raise UsageError(
                    f"protocol.named=[{layer}:{wrong[0]}]: layer {layer} has keys 0 to {width - 1}, no key {wrong[0]}"
                )
        elif options.keys > width:
            raise UsageError(f"protocol.keys={options.keys}: layer {layer} has only {width:,} keys")
        else:
            found[layer] = sorted(random.Random(f"{options.seed} {layer}").sample(range(width), options.keys))
    return found


def _counted(lm: LM, what: str, parts: Any, total: int | None = None) -> Iterator[Any]:
    """The parts, as a task of so many steps."""
    with lm.monitor.task(what, len(parts) if total is None else total) as advance:
        for part in parts:
            yield part
            advance(1)


def _rounded(value: Any) -> Any:
    """Numbers as results.jsonl holds them."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return list(map(_rounded, value)) if isinstance(value, (list, tuple)) else value
