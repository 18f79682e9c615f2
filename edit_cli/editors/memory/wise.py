"""WISE (Wang et al., 2024): edits go to a side memory of one feed-forward value matrix; a prompt is answered by it
if it is one of its own.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear, relu

from edit_cli.config.schema import Count, Linked, NonNegative, Positive, Share
from edit_cli.editors.base import Context
from edit_cli.editors.locate.context_prefixes import ContextConfig, sample_contexts
from edit_cli.editors.memory.activations import examples_of, inputs_of_rows, text_of
from edit_cli.editors.memory.base import MemoryConfig, MemoryEditor
from edit_cli.editors.memory.side_memory import Score, WiseLayer, WisePatch, activation_score, pooled_score
from edit_cli.editors.passes import passes, row_losses
from edit_cli.errors import UsageError
from edit_cli.requests import EditRequest
from edit_cli.statistics.corpora import Corpus
from edit_cli.writing import as_text

DOCUMENTS = 2000  # of the corpus, from which irrelevant sentences are drawn
Averaged = Literal["all", "violated"]


@dataclass(frozen=True, kw_only=True)
class WISEConfig(MemoryConfig):
    """The projection is the value matrix. The routing loss is max(0, Δ(x_i) − α) + max(0, β − Δ(x_e)) + max(0, γ −
    (Δ(x_e) − Δ(x_i))), x_e being a fact and x_i a text that does not name its subject.
    """

    module: str = "mlp_out"
    """Value matrix that the memory stands beside: mlp_in, mlp_out or its name in the block."""
    alpha: float = 5.0
    """α: activation score below which irrelevant texts stay."""
    beta: float = 20.0
    """β: activation score above which the memory's own facts come."""
    gamma: float = 10.0
    """γ: by how much they score above irrelevant texts."""
    averaged: Averaged = "all"
    """Rows over which a term of the routing loss is averaged: all, or, as released, those that violate its margin."""
    score: Score = "mean"
    """Activation score of a prompt: the mean over its tokens, as published, or that of its last one."""
    act_ratio: NonNegative = 0.88
    """A memory answers prompts that score above so many times the least of its own facts."""
    mask_ratio: Share = 0.2
    """ρ: share of the matrix that a shard writes to."""
    shard_every: Count = 500
    """Facts that a shard holds."""
    merge_every: Count | None = 1000
    """Facts after which all shards are merged, what was merged before among them; null keeps them apart, and the one
    with the highest score answers."""
    retrieve: bool = False
    """Whether only new shards are merged, so that merged groups stay apart, too (WISE-Retrieve)."""
    density: Share = 0.53
    """Share of its largest entries that a shard brings into the merge (TIES)."""
    lr: Positive = 1.0
    """Learning rate of SGD."""
    steps: Count = 70
    """Most training steps."""
    weight_decay: NonNegative = 1.0e-5
    """Weight decay of the side memory's matrix."""
    bound: Positive = 1.0
    """Distance within which every entry stays of the original's."""
    stop_loss: NonNegative = 0.02
    """Loss at which training stops, once it also hardly changes."""
    stop_change: NonNegative = 1.0e-4
    """Change of the loss at which training stops."""
    irrelevant: Count = 1
    """Irrelevant texts for each fact."""
    elsewhere: Literal["auto", "examples", "corpus"] = "auto"
    """Where irrelevant texts come from: examples of the training split, as published; sentences of the corpus; or
    examples where the data have such a split (auto)."""
    corpus: Annotated[Corpus | None, Linked("${stats.corpus}")] = None
    """Text that elsewhere=corpus takes."""
    context: ContextConfig = field(default_factory=lambda: ContextConfig(per_start=2))
    """Texts put before the prompt while it is trained."""
    batch_size: Count = 1
    """Facts that are trained together."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.merge_every and self.merge_every % self.shard_every:
            raise UsageError(
                f"method.merge_every={self.merge_every}: give a multiple of method.shard_every={self.shard_every}, or"
                " null"
            )


class WISE(MemoryEditor[WISEConfig]):
    """Side memory with activation routing, and sharded subspaces that are merged."""

    Config = WISEConfig
    Patch = WisePatch
    heads = ("causal",)

    @classmethod
    def require(cls, config: WISEConfig, model: str, context: Context) -> None:
        if not examples_of(context, config.elsewhere, "method.elsewhere"):
            text_of(config.corpus, "WISE").require()

    def edit(self, requests: Sequence[EditRequest]) -> WisePatch:
        """The side memory trained on, `batch_size` facts at a time."""
        # sampling takes everything off and puts it on again: the layers that stand there now are others after it
        _ = self._prefixes
        return self.in_turn(list(self._units(requests)), self._unit, "side memory")

    def _memory(self) -> WiseLayer:
        names = ("score", "act_ratio", "mask_ratio", "shard_every", "merge_every", "retrieve", "density", "seed")
        return self.memory(about={name: getattr(self.config, name) for name in names})

    def _units(self, requests: Sequence[EditRequest]) -> Iterator[Sequence[EditRequest]]:
        """Facts that are trained together: `batch_size` of them, all of one shard."""
        memory, first = self._memory(), 0
        room = memory.room
        while first < len(requests):
            size = min(self.config.batch_size, room)
            yield requests[first : first + size]
            first += size
            room = room - size or memory.about["shard_every"]

    def _unit(self, requests: Sequence[EditRequest]) -> WisePatch:
        """What facts that are trained together add to the memory that is attached."""
        memory = self._memory()
        shard, mask = memory.shards, memory.mask(memory.shards)
        shift, score = self._train(requests, memory, mask)
        content = {"about": memory.about, "units": [{"shard": shard, "facts": len(requests), "score": score}]}
        return WisePatch(self.module, memory.digest, {f"values.{shard}": shift[mask]}, content)

    def _train(self, requests: Sequence[EditRequest], memory: WiseLayer, mask: Tensor) -> tuple[Tensor, float]:
        """Δ after the facts, and the least score of their bare prompts."""
        lm, config, prefixes = self.lm, self.config, self._prefixes
        shift = torch.zeros(memory.shape, device=lm.device) if memory.shift is None else memory.shift.clone()
        rows = lm.head.encode([(r.in_context(prefix), r.target_new) for r in requests for prefix in prefixes])
        elsewhere = self._irrelevant(requests, memory.edits)
        original, last = lm.weight(self.module).float().to(lm.device), float("inf")
        with passes(lm, rows, self.module, self.layer) as run, ExitStack() as stack:
            inputs, prompt = run.inputs.float(), run.position.prompt
            plain = memory.original(inputs.to(lm.dtype)).detach()  # whatever earlier memories say
            stack.enter_context(run.from_cache())
            for _ in range(config.steps):
                shift.requires_grad_()
                moved = linear(inputs, shift)

                def beside(output: Tensor, moved: Tensor = moved) -> Tensor:
                    return plain + moved.to(output)

                losses = row_losses(run.answers(beside), len(rows))
                far = pooled_score(moved.norm(dim=-1), prompt, config.score)
                scores = [activation_score(states, shift) for states in elsewhere]
                near = torch.stack([score[-1] if config.score == "last" else score.mean() for score in scores])
                margins = near - config.alpha, config.beta - far, config.gamma - (far[:, None] - near)
                routing = torch.stack([hinge(margin, config.averaged) for margin in margins]).sum()
                loss = losses.mean() + routing.to(losses)
                if loss.item() <= config.stop_loss and abs(last - loss.item()) <= config.stop_change:
                    break
                last = loss.item()
                (gradient,) = torch.autograd.grad(loss, [shift])
                with torch.no_grad():
                    step = config.lr * (gradient + config.weight_decay * (original + shift)) * mask
                    shift = (shift - step).clamp(-config.bound, config.bound)
        shift = shift.detach()
        own = pooled_score(activation_score(inputs, shift), prompt, config.score)
        return shift, float(own[:: len(prefixes)].min())

    def _irrelevant(self, requests: Sequence[EditRequest], number: int) -> list[Tensor]:
        """Inputs (tokens, d_in) on texts that name none of the subjects.

        number: of the fact, which they are drawn for.
        """
        texts, wanted = self._texts, self.config.irrelevant * len(requests)
        subjects = [request.subject or request.text for request in requests]
        draw = random.Random(f"{self.config.seed} {number}")
        usable = draw.sample(texts, min(len(texts), 20 * wanted))
        usable = [text for text in usable if not any(subject in text for subject in subjects)][:wanted]
        if not usable:
            raise UsageError(
                "method.corpus has no sentence that names none of the subjects: give more text (corpus=NAME)"
            )
        rows = self.lm.head.encode([(text, None) for text in usable])
        return inputs_of_rows(self.lm, self.module, [row.ids for row in rows])

    @property
    def _texts(self) -> list[str]:
        """What the memory must not answer: prompts and answers of the training split, or sentences of the corpus."""

        def read() -> list[str]:
            examples = examples_of(self.context, self.config.elsewhere, "method.elsewhere")
            if examples:
                return [as_text(prompt, right) for prompt, right in examples]
            documents = islice(text_of(self.config.corpus, "WISE").documents(self.config.seed), DOCUMENTS)
            return [part.strip() for text in documents for part in text.split(". ") if len(part.split()) > 3]

        return self.context.once("irrelevant texts", read)

    @property
    def _prefixes(self) -> list[str]:
        return self.context.once("contexts", lambda: sample_contexts(self.lm, self.config.context)).texts


def hinge(terms: Tensor, averaged: Averaged) -> Tensor:
    """max(0, ·) of the terms: its mean over all of them, or over those above 0, which is 0 where there are none."""
    lost = relu(terms)
    return lost.mean() if averaged == "all" else lost.sum() / (terms > 0).sum().clamp_min(1)
