"""KE: a network reads the edit as text and says how much of each gradient to take, and what to add to it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_padded_sequence

from edit_cli.config.schema import Config, Count, Natural, NonNegative, Positive, SettingError
from edit_cli.editors.base import Context
from edit_cli.editors.meta.base import GradientConfig, GradientEditor, Logs, NotInRecipe, TrainingConfig
from edit_cli.editors.meta.episodes import Episode, EpisodeEvaluation, losses, sample_episodes
from edit_cli.editors.meta.factored_gradients import Gradient, Shift, gradients, largest, refuse_infinite, shifted
from edit_cli.editors.passes import row_losses, rows_right
from edit_cli.edits.edit import Factors, WeightDelta
from edit_cli.lm.model import LM
from edit_cli.lm.tokenization import Row
from edit_cli.requests import Case, EditRequest
from edit_cli.writing import bare

ANSWER_TOKENS = 8  # of the model's own answer, where a request does not tell the old one


@dataclass(frozen=True, kw_only=True)
class BoundConfig(Config):
    """The bound on the KL of answers that must stay."""

    place = "method.bound"

    active: bool = True
    """false: edit_weight · NLL + locality_weight · KL instead (as in the comparisons of MEND: 0.1 and 1)."""
    start: NonNegative = 1.0e-3
    """The bound m at first; published for questions (claims: 0.1)."""
    shrink: Positive = 0.8
    """What it is multiplied by at every validation with more than `above` percent of edits right."""
    above: NonNegative = 90.0
    """Percent of edits."""
    least: NonNegative = 1.0e-5
    """What it shrinks down to (claims: 0.001)."""
    lr: Positive = 0.1
    """Learning rate of its multiplier λ, which climbs and never falls below 0."""


@dataclass(frozen=True, kw_only=True)
class KEConfig(GradientConfig):
    """Published: all blocks, with part=block."""

    condition: str = "{old} >> {new} || {prompt}"
    """What the network reads; without an old answer in the data, the model's own."""
    hidden: Count = 128
    """Width of the LSTM, in one direction."""
    width: Count = 1024
    """Of what it makes of the text."""
    inner: Count = 128
    """Width of each matrix's own layer."""
    scale: Positive = 1.0
    """s, the most that a gradient is multiplied by."""
    step_size: NonNegative = 0.0
    """Above 0: begin as a plain step of that size down the gradient; 0: at random, as published."""
    learn_words: bool = True
    """Train the network's copy of the model's embeddings, too."""
    rounds: Annotated[Count, NotInRecipe] = 1
    """Edit again what is not right yet, so many times in all (the paper's loop: 5)."""
    others: Natural = 63
    """Further facts in a training edit, whose prompts must keep their answers: the rest of a published batch of 64
    (claims: 255)."""
    wordings: bool = False
    """Learn from a rephrased prompt, too (the paper's P_x)."""
    smoothing: Annotated[float, Ge(0), Le(1)] = 0.1
    """Of the labels in the training loss (published for questions)."""
    edit_weight: NonNegative = 1.0
    """Weight of the new answers at validation, and where the bound is not active."""
    bound: BoundConfig = field(default_factory=BoundConfig)
    """The paper's constraint."""
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            steps=200_000,
            edits=4,
            lr=3.0e-4,
            optimizer="rmsprop",
            schedule="linear",
            warmup=1000,
            validate_every=1000,
            validation_edits=500,
            save_every=1000,
        )
    )
    """How it is trained; published for questions (claims: 50,000 steps of one edit)."""

    @property
    def cases_per_edit(self) -> int:
        return 1 + self.others

    @property
    def cases_per_evaluation(self) -> int:
        return 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if lacking := [name for name in ("old", "new", "prompt") if f"{{{name}}}" not in self.condition]:
            raise SettingError(self.place, "condition", f"={self.condition}: it must hold {{{lacking[0]}}}")


class KE(GradientEditor[KEConfig, "KeNet"]):
    """Editing Factual Knowledge in Language Models (De Cao et al., 2021): ΔW = s σ(η) (∇W ⊙ A + B), with A and B of
    rank one (section 4).
    """

    Config = KEConfig
    heads = ("causal", "seq2seq", "classifier", "image")

    def __init__(self, config: KEConfig, lm: LM, context: Context | None = None) -> None:
        super().__init__(config, lm, context)
        self.old_answers: dict[str, str] = {}  # {prompt: the model's own}, of training requests that name none

    def build(self) -> KeNet:
        config = self.config
        net = KeNet(self.lm.head.words, self.modules, self.shapes, config)
        net.words.requires_grad_(config.learn_words)
        if config.step_size > 0:
            net.begin_as_descent(config.step_size)
        net.multiplier.requires_grad_(config.bound.active)
        return net

    def groups(self, net: KeNet) -> list[dict[str, Any]]:
        others = [parameter for parameter in net.parameters() if parameter is not net.multiplier]
        return [{"params": others}, {"params": [net.multiplier], "lr": self.config.bound.lr}]

    def loss(self, net: KeNet, batch: Sequence[Case]) -> tuple[Tensor, Logs]:
        """The Lagrangian NLL + λ (KL − m) of equation 4, which falls by the network and climbs by λ; the mean over
        independent edits.
        """
        config = self.config
        edited, episodes = self._episodes(batch, config.cases_per_edit if net.training else config.cases_per_evaluation)
        gradient = self.support_gradients(episodes)
        shifts = net(gradient, *self.read([case.requests[0] for case in edited], self.old_answers))
        evaluation = EpisodeEvaluation(self.cache, episodes, self.lowest)
        answers, query = evaluation.answers(shifts), evaluation.query
        nll, kl, logs = losses(answers, evaluation.base, query)
        if not net.training:
            logs["shift"] = largest(self.lm, shifts)
        if not net.training or not config.bound.active:
            return config.edit_weight * nll + config.locality_weight * kl, logs
        smooth = row_losses(answers, len(query), config.smoothing)[query.to(answers.rows.device)].mean()
        logs |= {"bound": float(net.bound), "multiplier": float(net.multiplier.detach())}
        return smooth + climbing(net.multiplier).squeeze() * (kl - net.bound), logs

    def after_step(self, net: KeNet) -> None:
        with torch.no_grad():
            net.multiplier.clamp_(min=0)

    def after_validation(self, net: KeNet, metrics: dict[str, Any]) -> None:
        bound = self.config.bound
        if metrics["es"] > bound.above:
            net.bound.mul_(bound.shrink).clamp_(min=bound.least)

    @torch.no_grad()
    def edit(self, requests: Sequence[EditRequest]) -> WeightDelta:
        """Of every request its own change, added up; as factors of one column more than a request has tokens."""
        net, lm, modules = self.trained(), self.lm, self.modules
        rows = lm.head.encode([(request.text, request.target_new) for request in requests])
        texts, mask = self.read(requests, {})
        wrong, steps = torch.arange(len(rows), device=texts.device), []
        shift = 0.0
        with ExitStack() as stack:
            for left in reversed(range(self.config.rounds)):
                shifts = net(gradients(lm, [rows[i] for i in wrong.tolist()], modules), texts[wrong], mask[wrong])
                refuse_infinite(shifts.values())
                steps.append({name: shifts[name].factors() for name in modules})
                shift = max(shift, largest(lm, shifts))
                if left:
                    stack.enter_context(
                        lm.edited(WeightDelta({f"{name}.weight": factors for name, factors in steps[-1].items()}))
                    )
                    wrong = self._wrong(rows).to(texts.device)
                    if not len(wrong):
                        break
        return self._written(steps, shift)

    @torch.no_grad()
    def edit_each(self, batches: Sequence[Sequence[EditRequest]]) -> list[WeightDelta] | None:
        """Of one fact each: in a pass each row meets what has been written of its own fact."""
        if any(len(requests) > 1 for requests in batches):
            return None
        net, lm, modules = self.trained(), self.lm, self.modules
        requests = [request for (request,) in batches]
        rows, (texts, mask) = lm.head.encode([(r.text, r.target_new) for r in requests]), self.read(requests, {})
        steps: list[list[dict[str, Factors]]] = [[] for _ in rows]
        size, wrong = [0.0] * len(rows), torch.arange(len(rows), device=texts.device)
        written: dict[str, Shift] = {}  # of the facts that are not right yet
        for left in reversed(range(self.config.rounds)):
            asked = [rows[i] for i in wrong.tolist()]
            with shifted(lm, written):
                shifts = net(gradients(lm, asked, modules), texts[wrong], mask[wrong])
            refuse_infinite(shifts.values())
            for place, number in enumerate(wrong.tolist()):
                own = {name: shift.of([place]) for name, shift in shifts.items()}
                steps[number].append({name: shift.factors() for name, shift in own.items()})
                size[number] = max(size[number], largest(lm, own))
            if not left:
                break
            written = {name: written[name].then(shifts[name]) if written else shifts[name] for name in modules}
            with shifted(lm, written):
                still = self._wrong(asked)
            written = {name: shift.of(still.tolist()) for name, shift in written.items()}
            wrong = wrong[still.to(wrong.device)]
            if not len(wrong):
                break
        return [self._written(each, shift) for each, shift in zip(steps, size, strict=True)]

    def _written(self, steps: Sequence[dict[str, Factors]], shift: float) -> WeightDelta:
        """All steps of an edit as one."""
        joined: dict[str, Factors | Tensor] = {
            f"{name}.weight": _joined([step[name] for step in steps]) for name in self.modules
        }
        return WeightDelta(joined, {"shift": shift}).compact(self.lm)

    def read(self, requests: Sequence[EditRequest], known: dict[str, str]) -> tuple[Tensor, Tensor]:
        """(ids, mask) of the conditions, both (requests, tokens).

        known: the model's own answers so far, where requests name no old one.
        """
        lm = self.lm
        asked = list(dict.fromkeys(r.text for r in requests if r.target_true is None and r.text not in known))
        known.update(zip(asked, lm.generate(asked, ANSWER_TOKENS) if asked else [], strict=True))
        old = [known[r.text].strip() if r.target_true is None else bare(r.target_true) for r in requests]
        edits = [(answer, bare(r.target_new), r.text) for answer, r in zip(old, requests, strict=True)]
        return lm.head.read(self.config.condition, edits)

    def _episodes(self, batch: Sequence[Case], size: int) -> tuple[list[Case], list[Episode]]:
        """Of every `size` cases the first is edited, and must work on its own prompt; those of the others must stay."""
        edited = list(batch[::size])
        episodes = []
        for number, drawn in enumerate(sample_episodes(edited, 1, self.config.draw)):
            others = [case.requests[0] for case in batch[number * size + 1 : (number + 1) * size]]
            kept = tuple((request.text, request.target_true or request.target_new) for request in others)
            query = drawn.support + (drawn.query if self.config.wordings else ())
            episodes.append(Episode(drawn.support, query, drawn.locality + kept))
        return edited, episodes

    def _wrong(self, rows: Sequence[Row]) -> Tensor:
        """Numbers of the rows that the model does not answer rightly yet."""
        return (~rows_right(self.lm.head.answers(rows, end=True), len(rows))).nonzero()[:, 0]


class KeNet(nn.Module):
    """An LSTM that reads conditions, and two layers for every edited matrix (section 4.2)."""

    bound: Tensor

    def __init__(
        self,
        words: Tensor,
        modules: Sequence[str],
        shapes: Sequence[tuple[int, int]],
        config: KEConfig,
    ) -> None:
        """words: the model's embeddings, where its own begin. shapes: (d_in, d_out) of each module."""
        super().__init__()
        self.modules_edited, self.shapes, self.scale = list(modules), list(shapes), config.scale
        hidden, width, inner = config.hidden, config.width, config.inner
        self.words = nn.Embedding.from_pretrained(words.detach().float().clone(), freeze=False)
        self.lstm = nn.LSTM(words.shape[1], hidden, batch_first=True, bidirectional=True)
        self.text = nn.Linear(2 * hidden, width)
        self.own = nn.ModuleList(
            nn.Sequential(
                weight_norm(nn.Linear(width, inner)), nn.Tanh(), weight_norm(nn.Linear(inner, 2 * (d_in + d_out) + 1))
            )
            for d_in, d_out in shapes
        )
        self.multiplier = nn.Parameter(torch.ones(1))  # FSDP takes no parameter without dimensions
        self.register_buffer("bound", torch.tensor(config.bound.start))

    @torch.no_grad()
    def begin_as_descent(self, size: float) -> None:
        """Let ΔW be −size ∇W, whatever the text: B is 0, softmax(α) is 1 / d_out, the gate a half."""
        own: Any  # Sequential, and its last layer's weight is normalized
        for (d_in, d_out), own in zip(self.shapes, self.own, strict=True):
            last = own[-1]
            last.parametrizations.weight.original0.zero_()
            last.bias.zero_()
            last.bias[:d_in] = -2 * d_out * size / self.scale

    def forward(self, gradient: dict[str, Gradient], ids: Tensor, mask: Tensor) -> dict[str, Shift]:
        """s σ(η) (∇W ⊙ A + B) of each module and edit; a row of gradients and a condition (edits, tokens) each."""
        text = self.conditions(ids, mask)
        parts = zip(self.modules_edited, self.shapes, self.own, strict=True)
        return {name: self._shift(own, shape, gradient[name], text) for name, shape, own in parts}

    def conditions(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(edits, width): what the LSTM makes of texts, of its last states in both directions."""
        packed = pack_padded_sequence(self.words(ids), mask.sum(1).cpu(), batch_first=True, enforce_sorted=False)
        _, (last, _) = self.lstm(packed)
        return torch.tanh(self.text(torch.cat([last[0], last[1]], -1)))

    def _shift(self, own: nn.Module, shape: tuple[int, int], gradient: Gradient, text: Tensor) -> Shift:
        """A = softmax(α) γᵀ over a gradient of factors δ, u is the same with factors softmax(α) ⊙ δ, γ ⊙ u: nothing
        is made dense.
        """
        d_in, d_out = shape
        mask_in, mask_out, added_in, added_out, gate = own(text).split([d_in, d_out, d_in, d_out, 1], -1)
        delta = gradient.outputs.to(text)
        step = self.scale * gate.sigmoid()[:, None]
        left = torch.cat([mask_out.softmax(-1)[:, None] * delta, added_out.softmax(-1)[:, None]], 1)
        right = torch.cat([mask_in[:, None] * gradient.inputs.to(text), added_in[:, None]], 1)
        return Shift(step * left, right)


def climbing(multiplier: Tensor) -> Tensor:
    """The same value, whose gradient points the other way: what is minimized climbs by it."""
    return 2 * multiplier.detach() - multiplier


def _joined(parts: Sequence[Factors]) -> Factors:
    return Factors(torch.cat([part.left for part in parts], 1), torch.cat([part.right for part in parts]))
