"""A memory of facts in front of a model, shared by all edits that were made with the same means: their facts are one
memory.

An edit holds its own facts only. Attached on top of another of its kind it adds them to that one's memory and answers
for both, so a prompt is looked up once, however many edits are attached, and the nearest fact answers, whenever it was
learned.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Any, TypedDict, TypeVar

import torch
from torch import Tensor

from edit_cli.config.schema import Config, SettingError
from edit_cli.editors.memory.base import Entries
from edit_cli.edits.edit import Route
from edit_cli.errors import UsageError
from edit_cli.files.shapes import Rule
from edit_cli.files.tensors import Size, size
from edit_cli.lm.heads.answers import Likelihood
from edit_cli.lm.heads.base import Head
from edit_cli.lm.model import LM
from edit_cli.lm.routing import Answerer, Destination
from edit_cli.lm.weights.access import Undo
from edit_cli.monitor import Monitor
from edit_cli.requests import EditRequest
from edit_cli.wording import many
from edit_cli.writing import as_text

F = TypeVar("F")  # what was found for a prompt
CPU = torch.device("cpu")
PROMPT = "New Fact: {fact}\nPrompt: {prompt}"  # how a model is told a fact before it is asked, as for IKE


@dataclass(frozen=True)
class Fact:
    """An edit as text: what is asked, and what is to be answered."""

    prompt: str
    answer: str

    @property
    def asked(self) -> str:
        """The prompt apart from case and spacing: facts of one prompt replace each other."""
        return normalized(self.prompt)

    @property
    def text(self) -> str:
        """Prompt and answer."""
        return as_text(self.prompt, self.answer)


def told(template: str, fact: str, prompt: str) -> str:
    """A template with its {fact} and {prompt} filled in; other braces are text."""
    parts = {"{fact}": fact, "{prompt}": prompt}
    return re.sub(r"\{fact\}|\{prompt\}", lambda slot: parts[slot[0]], template)


def check_template(config: Config, name: str) -> None:
    """Refuse a setting that is no template (SettingError)."""
    template = getattr(config, name)
    if "{fact}" not in template or "{prompt}" not in template:
        raise SettingError(config.place, name, f"={template}: it must hold {{fact}} and {{prompt}}")


def normalized(prompt: str) -> str:
    """A prompt apart from case and spacing."""
    return " ".join(prompt.lower().split())


def facts_of(requests: Sequence[EditRequest], monitor: Monitor) -> list[Fact]:
    """One fact a prompt: repetitions are dropped, and of different answers to one prompt the last one counts.

    Says so in one line.
    """
    latest = {fact.asked: fact for fact in (Fact(request.text, request.target_new) for request in requests)}
    if len(latest) < len(requests):
        distinct = Counter({(fact.asked, fact.answer) for fact in (Fact(r.text, r.target_new) for r in requests)})
        replaced = len(distinct) - len(latest)
        again = len(requests) - len(distinct)
        monitor.note(
            f"{len(requests)} edits are {many(len(latest), 'fact')}: {many(again, 'says', 'say')} again what another"
            f" says, and {many(replaced, 'is', 'are')} replaced by a later answer to the same prompt"
        )
    return list(latest.values())


class FactMemory:
    """Facts and their keys (n, width). A later fact of the same prompt replaces an earlier one."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.facts: list[Fact] = []
        self.keys = Entries(width, device)
        self.valid = Entries(1, device, torch.bool)
        self._latest: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.facts)

    @property
    def current(self) -> Tensor:
        """(n,) which facts have not been replaced."""
        return self.valid.all[:, 0]

    def latest(self, prompt: str) -> int | None:
        """The number of the fact of this very prompt."""
        return self._latest.get(normalized(prompt))

    def add(self, facts: Sequence[Fact], keys: Tensor) -> Undo:
        with ExitStack() as undo:
            first = len(self.facts)
            undo.callback(self.facts.__delitem__, slice(first, None))
            self.facts.extend(facts)
            undo.callback(self.keys.append(keys))
            undo.callback(self.valid.append(torch.ones(len(facts), 1, dtype=torch.bool)))
            for number, fact in enumerate(facts, first):
                earlier = self._latest.get(fact.asked)
                if earlier is None:
                    undo.callback(self._latest.pop, fact.asked)
                else:
                    undo.callback(self._latest.__setitem__, fact.asked, earlier)
                    gone = torch.tensor([earlier], device=self.valid.all.device)
                    undo.callback(self.valid.put(gone, torch.zeros(1, 1, dtype=torch.bool)))
                self._latest[fact.asked] = number
            return undo.pop_all().close


class FactsSaid(TypedDict):
    """What a saved edit says beside the keys of its facts. facts: prompts and answers."""

    facts: Annotated[list[tuple[str, str]], Rule(bool, "a list of facts")]
    maker: str


class FactRoute(Route):
    """Some facts and their keys (n, width), float32. maker: what made the keys; edits of one maker share one memory."""

    def __init__(self, facts: Sequence[Fact], keys: Tensor, maker: str) -> None:
        self.facts, self.keys, self.maker = list(facts), keys, maker
        self.memory = self._empty()
        self.covered = False  # by a later edit of its kind, which looks up its facts, too

    def attach(self, lm: LM) -> Undo:
        """Raises UsageError: it is in place already, here or on another model."""
        if self.memory:
            raise UsageError("this edit is in place on a model already: detach it there first, or load it once more")
        routes = [edit for edit in lm.attached if edit.kind == "route"]
        front = routes[-1] if routes else None
        with ExitStack() as undo:
            undo.callback(self._leave)
            if type(front) is type(self) and front.maker == self.maker:
                self.follow(front)
                self.memory, front.covered = front.memory, True
                undo.callback(setattr, front, "covered", False)
            else:
                self.prepare(lm)
                self.memory = self._empty(lm.device)
            undo.callback(self.memory.add(self.facts, self.keys))
            return undo.pop_all().close

    def _leave(self) -> None:
        self.memory, self.covered = self._empty(), False

    def _empty(self, device: torch.device = CPU) -> FactMemory:
        return FactMemory(self.keys.shape[1], device)

    def destinations(self, below: Answerer, prompts: Sequence[str]) -> list[Destination | None]:
        if self.covered or not self.memory:
            return [None] * len(prompts)
        distinct = list(dict.fromkeys(prompts))
        found = dict(zip(distinct, self.answers(below, distinct), strict=True))
        return [found[prompt] for prompt in prompts]

    @abstractmethod
    def prepare(self, lm: LM) -> None:
        """Get ready what looks prompts up and answers them."""

    @abstractmethod
    def follow(self, front: Any) -> None:
        """Take over from the route in front, of the same maker, what `prepare` got it."""

    @abstractmethod
    def answers(self, below: Answerer, prompts: Sequence[str]) -> list[Destination | None]:
        """Who answers which prompt. The prompts are distinct, the memory is not empty."""

    @classmethod
    def sizes(cls, lm: LM, names: Collection[str], rest: dict[str, Any]) -> dict[str, Size]:
        return {"keys": size(len(rest["facts"]), "width")}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"keys": self.keys}, {"facts": [[fact.prompt, fact.answer] for fact in self.facts], "maker": self.maker}


@dataclass
class Retold:
    """An answerer that is asked another text than the prompt.

    told(prompt, room): that text, with `room` tokens to come after it.
    """

    answerer: Answerer
    told: Callable[[str, int], str]
    head: Head[Any]

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        return self.answerer.loglikelihood(self._asked(pairs))

    def target_logprobs(self, pairs: Sequence[tuple[str, str]]) -> Sequence[Tensor | None]:
        return self.answerer.target_logprobs(self._asked(pairs))

    def generate(self, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        return self.answerer.generate([self.told(prompt, max_new_tokens) for prompt in prompts], max_new_tokens)

    def sample(self, prompts: Sequence[str], seeds: Sequence[int], max_tokens: int, top_k: int) -> list[str]:
        """The prompt and what comes after the text: as many tokens as would come after the prompt alone."""
        texts = [self.told(prompt, max(max_tokens - self.tokens(prompt), 0)) for prompt in prompts]
        more = [self.tokens(text) - self.tokens(prompt) for text, prompt in zip(texts, prompts, strict=True)]
        found = [""] * len(prompts)
        for extra in sorted(set(more)):
            which = [i for i, length in enumerate(more) if length == extra]
            room = min(max(max_tokens + extra, 1), max(self.head.max_length, max_tokens))
            whole = self.answerer.sample([texts[i] for i in which], [seeds[i] for i in which], room, top_k)
            for i, text in zip(which, whole, strict=True):
                found[i] = prompts[i] + text[len(texts[i]) :]
        return found

    def _asked(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        rooms = {target: self.tokens(target) + 1 for target in {target for _, target in pairs}}
        return [(self.told(prompt, rooms[target]), target) for prompt, target in pairs]

    def tokens(self, text: str) -> int:
        return len(self.head.tokenizer(text, add_special_tokens=True)["input_ids"])


def prompted(
    below: Answerer, head: Head[Any], found: Mapping[str, F | None], tell: Callable[[F, str, int], str]
) -> list[Destination | None]:
    """Who answers each prompt of `found` (distinct ones): the model itself, which reads what `tell` makes of what was
    found, the prompt, and the tokens to leave room for; nothing found: the bare prompt.
    """

    def text(prompt: str, room: int) -> str:
        fact = found[prompt]
        return prompt if fact is None else tell(fact, prompt, room)

    retold = Retold(below, text, head)
    return [None if fact is None else Destination(retold, prompt) for prompt, fact in found.items()]
