"""SERAC: facts are kept as text; a scope classifier finds the one that bears on a prompt, and a small model answers
by it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor, nn

from edit_cli.config.schema import NonNegative, SettingError, restored
from edit_cli.editors.base import Context
from edit_cli.editors.meta.base import Logs, NotInRecipe, TrainableConfig, TrainableEditor, TrainingConfig
from edit_cli.editors.retrieval.base import Fact, FactRoute, FactsSaid, Retold, check_template, facts_of, told
from edit_cli.editors.retrieval.scope_classifier import TINY, Scope, ScopeConfig
from edit_cli.editors.retrieval.scope_examples import ScopeExample, ScopeExampleSampler
from edit_cli.errors import MissingError, UsageError
from edit_cli.lm.auxiliary_model import AuxiliaryModelConfig, same_vocabulary
from edit_cli.lm.heads.answers import Likelihood
from edit_cli.lm.heads.base import Head
from edit_cli.lm.heads.kinds import head_of
from edit_cli.lm.model import LM
from edit_cli.lm.routing import Answerer, Destination, Routed
from edit_cli.requests import Case, EditRequest


@dataclass(frozen=True, kw_only=True)
class SERACConfig(TrainableConfig):
    """The classifier g, and the counterfactual model h that answers in the edited one's place."""

    scope: ScopeConfig = field(default_factory=ScopeConfig)
    """The classifier g."""
    counterfactual: AuxiliaryModelConfig = field(default_factory=AuxiliaryModelConfig)
    """The model h, of the edited model's kind and vocabulary."""
    join: str = "{fact} {prompt}"
    """What h reads: {fact} is prompt and new answer."""
    threshold: Annotated[float, Gt(0), Lt(1), NotInRecipe] = 0.5
    """g above which h answers."""
    mixing: Annotated[Literal["hard", "soft"], NotInRecipe] = "hard"
    """h or the edited model, as published for supervised training, or their probabilities mixed by g."""
    edit_weight: NonNegative = 0.1
    """c_edit, of the loss of h."""
    scope_weight: NonNegative = 1.0
    """c_loc, of the loss of g."""
    all_pairs: NonNegative = 0.0
    """Weight of facts with other subjects' prompts in the batch as negatives, beside those of the data set."""
    vary: Annotated[float, Ge(0), Le(1)] = 0.0
    """Share of training facts that are told in another wording and about an invented subject, beside which the same
    about a near namesake is out of scope; needed by models that begin at random."""
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            steps=100_000,
            edits=10,
            accumulate=10,
            lr=1.0e-5,
            validate_every=500,
            validation_edits=500,
            patience=4000,
            save_every=500,
        )
    )
    """How it is trained; edits: facts in a micro-batch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_template(self, "join")

    def read(self, fact: Fact, prompt: str) -> str:
        """What the counterfactual model reads."""
        return told(self.join, fact.text, prompt)


class SERAC(TrainableEditor[SERACConfig, "SeracNet"]):
    """Memory-Based Model Editing at Scale (Mitchell et al., 2022)."""

    Config = SERACConfig
    bound_to = "words"
    mass_editor = True
    heads = ("causal", "seq2seq", "classifier")
    experts = True

    @classmethod
    def require_training(cls, config: SERACConfig) -> None:
        config.counterfactual.require("method.counterfactual")
        config.scope.encoder().require("method.scope.model")

    def build(self) -> SeracNet:
        """Both models, as they begin.

        Raises:
            UsageError: the counterfactual model answers in another way, or in other tokens, than the edited one.
        """
        lm = self.lm
        budget = lm.head.batch_tokens
        scope = self.config.scope.build(lm.tokenizer, budget, lm.head.kind)
        model, tokenizer = self.config.counterfactual.build(lm.head.kind, lm.tokenizer, "method.counterfactual")
        if lm.head.kind != "classifier" and not same_vocabulary(tokenizer, lm.tokenizer):
            raise UsageError(
                f"the counterfactual model writes other tokens than {lm.name}, so that it cannot answer in its place: "
                "give method.counterfactual a checkpoint or a tokenizer with the same vocabulary"
            )
        return SeracNet(scope, model, tokenizer, budget).to(lm.device)

    def base(self) -> str:
        """Neither network has seen the edited model: they are bound to the words that they read and write, not to
        its weights.
        """
        vocabulary = sorted(self.lm.tokenizer.get_vocab().items())
        return f"vocabulary {hashlib.sha256(repr(vocabulary).encode()).hexdigest()}"

    def loss(self, net: SeracNet, batch: Sequence[Case]) -> tuple[Tensor, Logs]:
        """c_edit · NLL of h on prompts in scope + c_loc · (mean -log g in scope + mean -log(1 - g) out of scope),
        equation 3.

        The NLL is that of the answer and of its end. Where a fact rules replies out (opinions), -log(1 - p) of their
        tokens is added to it, as for ConvSent; that a reply ends is no fault of it, so their ends play no part.
        """
        config = self.config
        examples = ScopeExampleSampler(config.vary, random.Random(int(torch.randint(2**31, ())))).examples(batch)
        nll = -net.answers(
            [(config.read(example.fact, prompt), answer) for example in examples for prompt, answer in example.within]
        ).mean()
        against = [
            (config.read(example.fact, prompt), reply) for example in examples for prompt, reply in example.against
        ]
        if against:
            nll = nll - _log_not(net.answers(against, end=False)).mean()
        inside, outside, others = _pairs(examples, config.all_pairs > 0)
        facts = [example.fact for example in examples]
        prompts = [prompt for example in examples for prompt in example.prompts]
        log_in, log_out = net.scope.pairs(facts, prompts, torch.tensor(inside + outside + others))
        positive = -log_in[: len(inside)]
        negative, other = (-log_out[len(inside) :]).split([len(outside), len(others)])
        scope = positive.mean() + _mean(negative) + config.all_pairs * _mean(other)
        logs = {
            "nll": float(nll.detach()),
            "in_scope": float((log_in[: len(inside)] > -0.6931).float().mean()),
            "out_of_scope": (
                float((log_in[len(inside) : len(inside) + len(outside)] <= -0.6931).float().mean()) if outside else 1.0
            ),
        }
        return config.edit_weight * nll + config.scope_weight * scope, logs

    def edit(self, requests: Sequence[EditRequest]) -> SeracRoute:
        """The facts and their embeddings; neither model is touched."""
        return SeracRoute(*self.remembered(requests))

    def remembered(self, requests: Sequence[EditRequest]) -> tuple[Any, ...]:
        """What a route is made of."""
        net, context = self.trained(), self.context
        facts = facts_of(requests, self.lm.monitor)
        maker = context.once("maker", lambda: net.digest(self.config))
        command = context.once("train_command", lambda: context.train_command and context.train_command())
        return facts, net.scope.keys(facts), maker, self.config, command, net


class SeracNet(nn.Module):
    """The scope classifier and the counterfactual model, which is no part of the edited one."""

    def __init__(self, scope: Scope, counterfactual: Any, tokenizer: Any, batch_tokens: int) -> None:
        super().__init__()
        self.scope, self.counterfactual, self.tokenizer, self.batch_tokens = (
            scope,
            counterfactual,
            tokenizer,
            batch_tokens,
        )

    @property
    def head(self) -> Head[Any]:
        """How the counterfactual model answers."""
        device = next(self.counterfactual.parameters()).device
        return head_of(self.counterfactual, self.tokenizer, device, self.batch_tokens, replies=True)

    def answers(self, pairs: Sequence[tuple[str, str]], end: bool = True) -> Tensor:
        """(tokens,) log-likelihoods of the answers of (text, answer) pairs, and of their ends (a label has none)."""
        head = self.head
        answers = head.answers(head.encode(list(pairs)), end=end)
        return -nn.functional.cross_entropy(answers.logits, answers.labels, reduction="none")

    def digest(self, config: SERACConfig) -> str:
        """Of the weights and of the settings that tell where a prompt goes."""
        digest = hashlib.sha256(repr((asdict(config.scope), config.join, config.threshold, config.mixing)).encode())
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


def _pairs(
    examples: Sequence[ScopeExample], all_pairs: bool
) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """(fact, prompt) by their numbers: in scope, out of scope, and each fact with the prompts of examples about other
    subjects.
    """
    inside, outside, others = [], [], []
    first = 0
    for number, example in enumerate(examples):
        end = first + len(example.prompts)
        cut = first + len(example.within)
        inside += [[number, j] for j in range(first, cut)]
        outside += [[number, j] for j in range(cut, end)]
        if all_pairs:
            others += [[i, j] for i, other in enumerate(examples) if _apart(example, other) for j in range(first, end)]
        first = end
    return inside, outside, others


def _apart(first: ScopeExample, second: ScopeExample) -> bool:
    """Whether nothing that the one asks can be about the other's fact."""
    return first is not second and first.subject != second.subject and first.fact.asked != second.fact.asked


class SeracSaid(FactsSaid):
    """editor: the settings that the edit was made with."""

    editor: SERACConfig
    train_command: str | None


class SeracRoute(FactRoute):
    """Facts in front of a model, and who answers what is in their scope. Settings: the class of its settings."""

    said: ClassVar[Any] = SeracSaid
    Settings: ClassVar[type[SERACConfig]] = SERACConfig

    def __init__(
        self,
        facts: Sequence[Fact],
        keys: Tensor,
        maker: str,
        config: SERACConfig,
        train_command: str | None = None,
        net: SeracNet | None = None,
    ) -> None:
        """config, train_command: they know where its networks are, and how to train them."""
        super().__init__(facts, keys, maker)
        self.config, self.train_command, self.net = config, train_command, net

    def prepare(self, lm: LM) -> None:
        """Raises:
        MissingError: the networks are not there any more, or not the ones that the edit was made with.
        """
        if self.net is None:
            command = self.train_command
            context = Context(train_command=None if command is None else lambda: command)
            self.net = SERAC(self.config, lm, context).trained()
            if self.net.digest(self.config) != self.maker:
                raise MissingError(
                    f"method.checkpoint={self.config.checkpoint} holds other networks than this edit was made with:"
                    " make the edit again"
                )
            net: Any = self.net
            if net.scope.keys(self.facts[:1]).shape[1] != self.keys.shape[1]:
                raise MissingError("the keys of this edit have another width than its networks': make the edit again")
        self.head = self.net.head

    def follow(self, front: SeracRoute) -> None:
        self.net, self.head = front.net, front.head

    def answers(self, below: Answerer, prompts: Sequence[str]) -> list[Destination | None]:
        config, net = self.config, self.net
        assert net is not None  # `prepare` has found it
        shares, best = (values.tolist() for values in net.scope.best(self.memory, prompts))
        texts = {prompt: config.read(self.memory.facts[i], prompt) for i, prompt in zip(best, prompts, strict=True)}
        counterfactual = Counterfactual(self.head, lambda prompt, _: texts[prompt], self.head, below)
        if config.mixing == "soft":
            mixture = Mixture(below, counterfactual, dict(zip(prompts, shares, strict=True)), config.threshold)
            return [Destination(mixture, prompt) for prompt in prompts]
        return [
            Destination(counterfactual, prompt) if g > config.threshold else None
            for prompt, g in zip(prompts, shares, strict=True)
        ]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, rest = super().state()
        return tensors, {**rest, "editor": asdict(self.config), "train_command": self.train_command}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], rest: dict[str, Any]) -> SeracRoute:
        """Raises:
        MissingError: settings that no editor has.
        """
        try:
            config = restored(cls.Settings, rest["editor"])
        except SettingError as error:
            raise MissingError(f"this edit is damaged: {error}; make it again") from None
        facts = [Fact(*pair) for pair in rest["facts"]]
        return cls(facts, tensors["keys"], rest["maker"], config, rest.get("train_command"))


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
        """Raises:
        UsageError: another edit below answers with a stored text, which has no distribution.
        """
        own, other = self.below.target_logprobs(pairs), self.counterfactual.target_logprobs(pairs)
        mixed = []
        for (prompt, _), a, b in zip(pairs, own, other, strict=True):
            if a is None or b is None:
                raise UsageError(
                    f"method.mixing=soft mixes distributions, and {prompt[:60]!r} is answered with a stored text, which"
                    " has none: give method.mixing=hard"
                )
            g = torch.tensor(self.shares[prompt], device=a.device)
            mixed.append(torch.logaddexp((1 - g).log() + a, g.log() + b))
        return mixed

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
