"""SERAC: facts are kept as text; a scope classifier finds the one that bears on a prompt, and a small model answers
by it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from edit_cli.editors.meta.base import TrainableEditor
from edit_cli.editors.retrieval.base import Fact, FactRoute, FactsSaid, Retold, facts_of
from edit_cli.editors.retrieval.scope_classifier import TINY, Scope, ScopeOptions
from edit_cli.editors.retrieval.scope_examples import Lesson, Teller
from edit_cli.errors import MissingError, UsageError
from edit_cli.lm.auxiliary_model import Companion, same_vocabulary
from edit_cli.lm.causal import Likelihood
from edit_cli.lm.kinds import Head, head_of
from edit_cli.lm.model import LM
from edit_cli.lm.routing import Answerer, Destination, Routed
from edit_cli.requests import Case, EditRequest
from edit_cli.writing import as_text


@dataclass(kw_only=True)
class SERAC(TrainableEditor):
    """Memory-Based Model Editing at Scale (Mitchell et al., 2022).

    scope: the classifier g. counterfactual: the model h that answers in the edited one's place; it shares its
    vocabulary.
    join: the text that h reads, of {fact} (prompt and new answer) and {prompt}.
    threshold: g above which h answers. mixing: hard (h or the model, as published for supervised training), or soft
    (their probabilities mixed by g). edit_weight, scope_weight: c_edit and c_loc of the training loss. all_pairs:
    weight of all pairs of a fact and another fact's prompts in a batch as negatives, beside those that the data set
    gives. vary: share of training facts that are told in another of their wordings and about an invented subject,
    beside which the same about a near namesake is out of scope.
    """

    bound_to = "words"
    NO_RECIPE = (*TrainableEditor.NO_RECIPE, "threshold", "mixing")
    mass_editor = True
    heads = ("causal", "seq2seq", "classifier")

    scope: ScopeOptions = field(default_factory=ScopeOptions)
    counterfactual: Companion = field(default_factory=Companion)
    join: str = "{fact} {prompt}"
    threshold: float = 0.5
    mixing: str = "hard"
    edit_weight: float = 0.1
    scope_weight: float = 1.0
    all_pairs: float = 0.0
    vary: float = 0.0

    def require_training(self) -> None:
        self.counterfactual.require("method.counterfactual")
        self.scope.encoder().require("method.scope.model")

    def build(self, lm: LM) -> SeracNet:
        """Both models, as they begin.

        Raises:
            UsageError: the counterfactual model answers in another way, or in other tokens, than the edited one.
        """
        self._refuse_wrong_words()
        budget = lm.head.batch_tokens
        scope = self.scope.build(lm.tokenizer, budget)
        model, tokenizer = self.counterfactual.build(lm.head.kind, lm.tokenizer, "method.counterfactual")
        if lm.head.kind != "classifier" and not same_vocabulary(tokenizer, lm.tokenizer):
            raise UsageError(
                f"the counterfactual model writes other tokens than {lm.name}, so that it cannot answer in its place: "
                "give method.counterfactual a checkpoint or a tokenizer with the same vocabulary"
            )
        return SeracNet(scope, model, tokenizer, budget).to(lm.device)

    def base(self, lm: LM) -> str:
        """Neither network has seen the edited model: they are bound to the words that they read and write, not to
        its weights.
        """
        vocabulary = sorted(lm.tokenizer.get_vocab().items())
        return f"vocabulary {hashlib.sha256(repr(vocabulary).encode()).hexdigest()}"

    def recipe(self) -> dict[str, Any]:
        """Networks that were trained without the ends of answers never stop, and are not to be found."""
        return {**super().recipe(), "learns": "answers and their ends"}

    def loss(self, net: SeracNet, lm: LM, batch: Sequence[Case]) -> tuple[Tensor, dict[str, float]]:
        """c_edit · NLL of h on prompts in scope + c_loc · (mean -log g in scope + mean -log(1 - g) out of scope),
        equation 3.

        The NLL is that of the answer and of its end. Where a fact rules replies out (opinions), -log(1 - p) of their
        tokens is added to it, as for ConvSent; that a reply ends is no fault of it, so their ends play no part.
        """
        lessons = Teller(self.vary, random.Random(int(torch.randint(2**31, ())))).lessons(batch)
        nll = -net.answers(
            [(self.read(lesson.fact, prompt), answer) for lesson in lessons for prompt, answer in lesson.within]
        ).mean()
        against = [(self.read(lesson.fact, prompt), reply) for lesson in lessons for prompt, reply in lesson.against]
        if against:
            nll = nll - _log_not(net.answers(against, end=False)).mean()
        inside, outside, others = _pairs(lessons, self.all_pairs > 0)
        facts = [lesson.fact for lesson in lessons]
        prompts = [prompt for lesson in lessons for prompt in lesson.prompts]
        log_in, log_out = net.scope.pairs(facts, prompts, torch.tensor(inside + outside + others))
        positive = -log_in[: len(inside)]
        negative, other = (-log_out[len(inside) :]).split([len(outside), len(others)])
        scope = positive.mean() + _mean(negative) + self.all_pairs * _mean(other)
        told = {
            "nll": float(nll.detach()),
            "in_scope": float((log_in[: len(inside)] > -0.6931).float().mean()),
            "out_of_scope": (
                float((log_in[len(inside) : len(inside) + len(outside)] <= -0.6931).float().mean()) if outside else 1.0
            ),
        }
        return self.edit_weight * nll + self.scope_weight * scope, told

    def read(self, fact: Fact, prompt: str) -> str:
        """What the counterfactual model reads."""
        return self.join.format(fact=as_text(fact.prompt, fact.answer), prompt=prompt)

    def edit(self, lm: LM, requests: Sequence[EditRequest]) -> SeracRoute:
        """The facts and their embeddings; neither model is touched."""
        net = self.trained(lm)
        facts = facts_of(requests, lm.monitor)
        memory = self.scratch(lm)
        memory["maker"] = memory.get("maker") or net.digest(self)
        return SeracRoute(facts, net.scope.keys(facts), memory["maker"], self, net)

    def _refuse_wrong_words(self) -> None:
        if self.mixing not in ("hard", "soft"):
            raise UsageError(f"method.mixing={self.mixing}: choose hard or soft")
        if not 0 < self.threshold < 1:
            raise UsageError(f"method.threshold={self.threshold}: give a number between 0 and 1")
        if "{fact}" not in self.join or "{prompt}" not in self.join:
            raise UsageError(f"method.join={self.join}: it must hold {{fact}} and {{prompt}}")


class SeracNet(nn.Module):
    """The scope classifier and the counterfactual model, which is no part of the edited one."""

    def __init__(self, scope: Scope, counterfactual: nn.Module, tokenizer: Any, batch_tokens: int) -> None:
        super().__init__()
        self.scope, self.counterfactual, self.tokenizer, self.batch_tokens = (
            scope,
            counterfactual,
            tokenizer,
            batch_tokens,
        )

    @property
    def head(self) -> Head:
        """How the counterfactual model answers."""
        device = next(self.counterfactual.parameters()).device
        return head_of(self.counterfactual, self.tokenizer, device, self.batch_tokens, replies=True)

    def answers(self, pairs: Sequence[tuple[str, str]], end: bool = True) -> Tensor:
        """(tokens,) log-likelihoods of the answers of (text, answer) pairs, and of their ends (a label has none)."""
        head = self.head
        found = head.answers(head.encode(list(pairs)), end=end)
        return -nn.functional.cross_entropy(found.logits, found.labels, reduction="none")

    def digest(self, editor: SERAC) -> str:
        """Of the weights and of the settings that tell where a prompt goes."""
        digest = hashlib.sha256(repr((asdict(editor.scope), editor.join, editor.threshold, editor.mixing)).encode())
        for name, value in self.state_dict().items():
            value = value.detach().contiguous().cpu()
            digest.update(f"{name}:{value.dtype}:{tuple(value.shape)}".encode())
            digest.update(value.view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def _log_not(log_p: Tensor) -> Tensor:
    """log(1 - p)."""
    return (-torch.expm1(log_p.clamp(max=-TINY))).log()


def _mean(values: Tensor) -> Tensor:
    return values.mean() if len(values) else values.sum()


def _pairs(lessons: Sequence[Lesson], all_pairs: bool) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """(fact, prompt) by their numbers: in scope, out of scope, and each fact with the prompts of lessons about other
    subjects.
    """
    inside, outside, others = [], [], []
    first = 0
    for number, lesson in enumerate(lessons):
        end = first + len(lesson.prompts)
        cut = first + len(lesson.within)
        inside += [[number, j] for j in range(first, cut)]
        outside += [[number, j] for j in range(cut, end)]
        if all_pairs:
            others += [[i, j] for i, other in enumerate(lessons) if _apart(lesson, other) for j in range(first, end)]
        first = end
    return inside, outside, others


def _apart(first: Lesson, second: Lesson) -> bool:
    """Whether nothing that the one asks can be about the other's fact."""
    return first is not second and first.subject != second.subject and first.fact.asked != second.fact.asked


class SeracSaid(FactsSaid):
    """editor: the settings that the edit was made with."""

    editor: SERAC
    train_command: str | None


class SeracRoute(FactRoute):
    """Facts in front of a model, and who answers what is in their scope. editor: knows where its networks are."""

    said = SeracSaid

    def __init__(
        self, facts: Sequence[Fact], keys: Tensor, maker: str, editor: SERAC, net: SeracNet | None = None
    ) -> None:
        super().__init__(facts, keys, maker)
        self.editor, self.net = editor, net

    def prepare(self, lm: LM) -> None:
        """Raises:
        MissingError: the networks are not there any more, or not the ones that the edit was made with.
        """
        if self.net is None:
            self.net = self.editor.trained(lm)
            if self.net.digest(self.editor) != self.maker:
                raise MissingError(
                    f"method.checkpoint={self.editor.checkpoint} holds other networks than this edit was made with:"
                    " make the edit again"
                )
            net: Any = self.net
            if net.scope.keys(self.facts[:1]).shape[1] != self.keys.shape[1]:
                raise MissingError("the keys of this edit have another width than its networks': make the edit again")
        self.head = self.net.head

    def follow(self, front: SeracRoute) -> None:
        self.net, self.head = front.net, front.head

    def answers(self, below: Answerer, prompts: Sequence[str]) -> list[Destination | None]:
        editor = self.editor
        shares, best = (found.tolist() for found in self.net.scope.best(self.memory, prompts))
        told = {prompt: editor.read(self.memory.facts[i], prompt) for i, prompt in zip(best, prompts, strict=True)}
        counterfactual = Counterfactual(self.head, lambda prompt, _: told[prompt], self.head, below)
        if editor.mixing == "soft":
            mixture = Mixture(below, counterfactual, dict(zip(prompts, shares, strict=True)), editor.threshold)
            return [Destination(mixture, prompt) for prompt in prompts]
        return [
            Destination(counterfactual, prompt) if g > editor.threshold else None
            for prompt, g in zip(prompts, shares, strict=True)
        ]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, rest = super().state()
        return tensors, {
            **rest,
            "editor": asdict(self.editor),
            "train_command": getattr(self.editor, "train_command", None),
        }

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], rest: dict[str, Any]) -> SeracRoute:
        settings = dict(rest["editor"])
        scope = {**settings.pop("scope")}
        scope["model"] = Companion(**scope["model"])
        editor = SERAC(
            **{**settings, "scope": ScopeOptions(**scope), "counterfactual": Companion(**settings["counterfactual"])}
        )
        editor.train_command = rest.get("train_command")
        return cls([Fact(*pair) for pair in rest["facts"]], tensors["keys"], rest["maker"], editor)


@dataclass
class Counterfactual(Retold):
    """The counterfactual model. In running text it writes the answer; what follows is written by the model `below`,
    which reads the prompt and the answer.

    So an edited causal model goes on as any other does after an answer. A reply of the other kinds is the answer alone.
    """

    below: Answerer

    def generate(self, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        replies = super().generate(prompts, max_new_tokens)
        if self.head.kind != "causal":
            return replies
        texts = [prompt + reply for prompt, reply in zip(prompts, replies, strict=True)]
        rooms = [
            max_new_tokens - (self.tokens(text) - self.tokens(prompt))
            for text, prompt in zip(texts, prompts, strict=True)
        ]
        for room in sorted({room for room in rooms if room > 0}):
            which = [i for i, left in enumerate(rooms) if left == room]
            for i, more in zip(which, self.below.generate([texts[i] for i in which], room), strict=True):
                replies[i] += more
        return replies

    def sample(self, prompts: Sequence[str], seeds: Sequence[int], max_tokens: int, top_k: int) -> list[str]:
        texts = super().sample(prompts, seeds, max_tokens, top_k)
        return self.below.sample(texts, seeds, max_tokens, top_k) if self.head.kind == "causal" else texts


@dataclass
class Mixture:
    """Answers with (1 - g) p(model) + g p(h), token by token; writes texts as the hard switch does.

    shares: {prompt: g}.
    """

    below: Answerer
    counterfactual: Counterfactual
    shares: dict[str, float]
    threshold: float

    def target_logprobs(self, pairs: Sequence[tuple[str, str]]) -> list[Tensor]:
        own, other = self.below.target_logprobs(pairs), self.counterfactual.target_logprobs(pairs)
        shares = [torch.tensor(self.shares[prompt], device=a.device) for (prompt, _), a in zip(pairs, own, strict=True)]
        return [torch.logaddexp((1 - g).log() + a, g.log() + b) for g, a, b in zip(shares, own, other, strict=True)]

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        scores = []
        for row, logprobs in zip(
            self.counterfactual.head.encode(list(pairs)), self.target_logprobs(pairs), strict=True
        ):
            labels, best = torch.tensor(row.target, device=logprobs.device), logprobs.argmax(-1)
            nll = -logprobs.gather(1, labels[:, None]).mean()
            scores.append(Likelihood(float(nll), tuple((best == labels).tolist()), tuple(best.tolist())))
        return scores

    def generate(self, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        return self._switch.generate(prompts, max_new_tokens)

    def sample(self, prompts: Sequence[str], seeds: Sequence[int], max_tokens: int, top_k: int) -> list[str]:
        return self._switch.sample(prompts, seeds, max_tokens, top_k)

    @property
    def _switch(self) -> Routed:
        return Routed(self.below, self)

    def destinations(self, below: Answerer, prompts: Sequence[str]) -> list[Destination | None]:
        return [
            Destination(self.counterfactual, prompt) if self.shares[prompt] > self.threshold else None
            for prompt in prompts
        ]
