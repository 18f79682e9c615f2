"""WISE (Wang et al., 2024): edits go to a side memory of one feed-forward value matrix; a prompt is answered by it
if it is one of its own.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, relu

from edit_cli.editors.locate.context_prefixes import ContextConfig, sample_contexts
from edit_cli.editors.memory.activations import inputs_of_rows
from edit_cli.editors.memory.base import in_turn, module_of
from edit_cli.editors.memory.side_memory import LAST, MEAN, WiseLayer, WisePatch, over, stir
from edit_cli.editors.old import AUTO, CORPUS, EXAMPLES, Editor
from edit_cli.editors.passes import passes, row_losses
from edit_cli.errors import UsageError
from edit_cli.lm.model import LM
from edit_cli.requests import EditRequest
from edit_cli.statistics.corpora import Corpus
from edit_cli.writing import as_text

DOCUMENTS = 2000  # of the corpus, from which irrelevant sentences are drawn
TRAINING = "train"  # the split of the examples
ALL, VIOLATED = "all", "violated"  # rows over which a term of the routing loss is averaged


@dataclass(kw_only=True)
class Wise(Editor):
    """Side memory with activation routing, and sharded subspaces that are merged.

    layer, module: the value matrix. alpha, beta, gamma: margins of the routing loss
    max(0, Δ(x_i) − α) + max(0, β − Δ(x_e)) + max(0, γ − (Δ(x_e) − Δ(x_i))), x_i being texts that name none of the
    subjects: `irrelevant` a fact; averaged: over "all" rows, or, as released, over those that "violated" their margin.
    elsewhere: where they come from: "examples" of the training split, as published;
    sentences of `corpus`; or "auto": examples where the data have such a split.
    score: of a prompt: "mean" over its tokens, or that of its "last" one. act_ratio: share of ε above which a memory
    answers.
    mask_ratio: ρ. shard_every: facts a shard holds. merge_every: facts after which all shards are merged, what was
    merged before among them; with `retrieve` the new ones only, so that merged groups stay apart, and the one that is
    stirred most answers (WISE-Retrieve); null keeps every shard apart. density: kept by TIES. lr, steps, weight_decay:
    SGD under the mask, every entry within `bound` of the original. It stops once the loss is below `stop_loss` and has
    moved by `stop_change` at most.
    """

    layer: int
    module: str = "mlp_out"
    alpha: float = 5.0
    beta: float = 20.0
    gamma: float = 10.0
    averaged: str = ALL
    score: str = MEAN
    act_ratio: float = 0.88
    mask_ratio: float = 0.2
    shard_every: int = 500
    merge_every: int | None = 1000
    retrieve: bool = False
    density: float = 0.53
    lr: float = 1.0
    steps: int = 70
    weight_decay: float = 1.0e-5
    bound: float = 1.0
    stop_loss: float = 0.02
    stop_change: float = 1.0e-4
    irrelevant: int = 1
    elsewhere: str = AUTO
    corpus: Corpus | None = None
    context: ContextConfig = field(default_factory=lambda: ContextConfig(per_start=2))
    batch_size: int = 1
    seed: int = 0

    @property
    def layers(self) -> list[int]:
        return [self.layer]

    def edit(self, lm: LM, requests: Sequence[EditRequest]) -> WisePatch:
        """The side memory trained on, `batch_size` facts at a time."""
        self._refuse_wrong_numbers()
        name = module_of(lm, self.layer, self.module)
        # takes everything off and puts it on again: the layers that stand there now are others after it
        self._prefixes(lm)
        units = list(self._units(requests, WisePatch.present(lm, name)))
        with in_turn(lm, units, lambda unit: self._unit(lm, name, unit), "side memory") as patches:
            return joined(patches)

    def _units(self, requests: Sequence[EditRequest], layer: WiseLayer | None) -> Iterator[Sequence[EditRequest]]:
        """Facts that are trained together: `batch_size` of them, all of one shard."""
        shard = layer.about["shard_every"] if layer else self.shard_every
        first, room = 0, layer.room if layer else shard
        while first < len(requests):
            size = min(self.batch_size, room)
            yield requests[first : first + size]
            first += size
            room = room - size or shard

    def _unit(self, lm: LM, name: str, requests: Sequence[EditRequest]) -> WisePatch:
        """What facts that are trained together add to the memory that is attached."""
        layer = WisePatch.present(lm, name)
        fresh = layer or WiseLayer(lm.module(name), lm, name, self._about())
        if layer is None:
            fresh.close()
        shard, mask = fresh.shards, fresh.mask(fresh.shards)
        start = torch.zeros(fresh.shape, device=lm.device) if fresh.shift is None else fresh.shift.clone()
        shift, score = self._train(lm, name, requests, start, mask, fresh.edits)
        content = {"about": fresh.about, "units": [{"shard": shard, "facts": len(requests), "score": score}]}
        return WisePatch(name, layer.digest if layer else "", {f"values.{shard}": shift[mask]}, content)

    def _train(
        self, lm: LM, name: str, requests: Sequence[EditRequest], shift: Tensor, mask: Tensor, number: int
    ) -> tuple[Tensor, float]:
        """Δ after the facts, and the least score of their bare prompts."""
        prefixes = self._prefixes(lm)
        rows = lm.head.encode([(prefix + r.text, r.target_new) for r in requests for prefix in prefixes])
        elsewhere = self._irrelevant(lm, name, requests, number)
        original, last = lm.weight(name).float().to(lm.device), float("inf")
        with passes(lm, rows, name, self.layer) as run, ExitStack() as stack:
            inputs, prompt = run.inputs.float(), run.focus.prompt
            present = WisePatch.present(lm, name)
            # whatever earlier memories say
            plain = None if present is None else present.original(inputs.to(lm.dtype)).detach()
            stack.enter_context(run.replayed())
            for _ in range(self.steps):
                shift.requires_grad_()
                moved = linear(inputs, shift)

                def beside(output: Tensor, moved: Tensor = moved) -> Tensor:
                    return (output if plain is None else plain) + moved.to(output)

                losses = row_losses(run.answers(beside), len(rows))
                far = over(moved.norm(dim=-1), prompt, self.score)
                near = torch.stack(
                    [stir(x, shift)[-1] if self.score == LAST else stir(x, shift).mean() for x in elsewhere]
                )
                margins = near - self.alpha, self.beta - far, self.gamma - (far[:, None] - near)
                routing = torch.stack([hinge(margin, self.averaged) for margin in margins]).sum()
                loss = losses.mean() + routing.to(losses)
                if loss.item() <= self.stop_loss and abs(last - loss.item()) <= self.stop_change:
                    break
                last = loss.item()
                (gradient,) = torch.autograd.grad(loss, [shift])
                with torch.no_grad():
                    step = self.lr * (gradient + self.weight_decay * (original + shift)) * mask
                    shift = (shift - step).clamp(-self.bound, self.bound)
        shift = shift.detach()
        return shift, float(over(stir(inputs, shift), prompt, self.score)[:: len(prefixes)].min())

    def require(self, model: str) -> None:
        self._refuse_wrong_numbers()
        if not self._of_examples():
            self._text().require()

    def _of_examples(self) -> list[tuple[str, str]]:
        told = list(self.examples(TRAINING)) if self.examples and self.elsewhere != CORPUS else []
        if not told and self.elsewhere == EXAMPLES:
            raise UsageError(
                "method.elsewhere=examples: the data have no training records beside those of this run"
                " (method.elsewhere=corpus)"
            )
        return told

    def _text(self) -> Corpus:
        if self.corpus is None:
            raise UsageError(
                "method.corpus has no value: WISE needs text that its memory must not answer (corpus=NAME)"
            )
        return self.corpus

    def _irrelevant(self, lm: LM, name: str, requests: Sequence[EditRequest], number: int) -> list[Tensor]:
        """Inputs (tokens, d_in) on texts that name none of the subjects."""
        texts = self._texts(lm)
        draw = random.Random(f"{self.seed} {number}")
        subjects = [request.subject or request.text for request in requests]
        usable = draw.sample(texts, min(len(texts), 20 * self.irrelevant * len(requests)))
        usable = [text for text in usable if not any(subject in text for subject in subjects)][
            : self.irrelevant * len(requests)
        ]
        if not usable:
            raise UsageError(
                "method.corpus has no sentence that names none of the subjects: give more text (corpus=NAME)"
            )
        return inputs_of_rows(lm, name, [row.ids for row in lm.head.encode([(text, None) for text in usable])])

    def _texts(self, lm: LM) -> list[str]:
        """What the memory must not answer: prompts and answers of the training split, or sentences of the corpus."""
        kept = self.scratch(lm)
        if "texts" not in kept:
            texts = [as_text(prompt, right) for prompt, right in self._of_examples()]
            if not texts:
                documents = islice(self._text().documents(self.seed), DOCUMENTS)
                texts = [part.strip() for text in documents for part in text.split(". ") if len(part.split()) > 3]
            kept["texts"] = texts
        return kept["texts"]

    def _prefixes(self, lm: LM) -> list[str]:
        kept = self.scratch(lm)
        if "prefixes" not in kept:
            kept["prefixes"] = sample_contexts(lm, self.context).texts
        return kept["prefixes"]

    def _about(self) -> dict[str, Any]:
        names = ("score", "act_ratio", "mask_ratio", "shard_every", "merge_every", "retrieve", "density", "seed")
        return {name: getattr(self, name) for name in names}

    def _refuse_wrong_numbers(self) -> None:
        if self.score not in (MEAN, LAST):
            raise UsageError(f"method.score={self.score}: choose mean or last")
        if self.averaged not in (ALL, VIOLATED):
            raise UsageError(f"method.averaged={self.averaged}: choose {ALL} or {VIOLATED}")
        if self.elsewhere not in (AUTO, EXAMPLES, CORPUS):
            raise UsageError(f"method.elsewhere={self.elsewhere}: choose auto, examples or corpus")
        if not 0 < self.mask_ratio <= 1 or not 0 < self.density <= 1:
            raise UsageError(
                f"method.mask_ratio={self.mask_ratio}, method.density={self.density}: give shares above 0, at most 1"
            )
        if self.shard_every < 1 or (self.merge_every and self.merge_every % self.shard_every):
            raise UsageError(
                f"method.merge_every={self.merge_every}: give a multiple of method.shard_every={self.shard_every}, or"
                " null"
            )


def hinge(terms: Tensor, averaged: str) -> Tensor:
    """max(0, ·) of the terms: its mean over all of them, or over those above 0, which is 0 where there are none."""
    lost = relu(terms)
    return lost.mean() if averaged == ALL else lost.sum() / (terms > 0).sum().clamp_min(1)


def joined(patches: Sequence[WisePatch]) -> WisePatch:
    """One patch for facts that were trained one after another; of each shard only the last values count."""
    tensors = {key: value for patch in patches for key, value in patch.tensors.items()}
    units: list[dict[str, Any]] = []
    for unit in (unit for patch in patches for unit in patch.content["units"]):
        if units and units[-1]["shard"] == unit["shard"]:
            earlier = units.pop()
            unit = {**unit, "facts": earlier["facts"] + unit["facts"], "score": min(earlier["score"], unit["score"])}
        units.append(unit)
    return WisePatch(patches[0].module, patches[0].before, tensors, {**patches[0].content, "units": units})
