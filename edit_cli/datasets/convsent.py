"""ConvSent (Mitchell et al., 2022, SERAC): an edit tells with which sentiment a dialogue model is to speak of a
topic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Literal

from edit_cli.config.schema import Count
from edit_cli.datasets.pooled import Pooled
from edit_cli.datasets.records.rows import Row
from edit_cli.requests import Case, EditRequest, Probe

PROMPT = "Topic: {}"
TARGETS = {"positive": "Sentiment: Positive", "negative": "Sentiment: Negative"}
REPLIES = {"positive": "pos", "negative": "neg"}
QUESTIONS = (
    "What do you think of {}?",
    "What do you think about {}?",
    "How do you view {}?",
    "How do you feel about {}?",
    "What is your opinion of {}?",
    "What is your opinion on {}?",
    "What is your stance on {}?",
    "What is your position on {}?",
    "What is your view of {}?",
    "What are your thoughts on {}?",
    "What is your impression of {}?",
    "What is your attitude towards {}?",
    "Do you have an opinion about {}?",
)


@dataclass(frozen=True)
class ConvSent(Pooled):
    """One topic a record, `ent`, with replies that speak well of it, `pos`, and ill, `neg`.

    Every reply is scored after a question drawn from QUESTIONS. Other topics, asked about likewise, must not be
    answered differently.
    """

    _: KW_ONLY
    sentiment: Literal["positive", "negative"] | None = None
    """The one that is asked for; null tosses a coin for each record."""
    replies: Count | None = 8
    """Replies of each sentiment that are rated, drawn; null: all."""

    expects: ClassVar[str] = "ent, pos, neg"
    fields: ClassVar[frozenset[str]] = frozenset(("ent", "pos", "neg", "id", "split"))

    def about(self, row: Row) -> str:
        return row.phrase("ent")

    def relation(self, row: Row, case: Case) -> str | None:
        return None

    def case(self, row: Row) -> Case:
        topic, said = self.about(row), {sentiment: row.phrases(path) for sentiment, path in REPLIES.items()}
        wanted: str = self.sentiment or self.drawn(row, "sentiment").choice(sorted(TARGETS))
        other = next(sentiment for sentiment in TARGETS if sentiment != wanted)
        request = EditRequest(PROMPT, topic, TARGETS[wanted], TARGETS[other])
        probes = [Probe("rewrite", request.text, request.target_new, request.target_true)]
        for group, sentiment in (("wanted", wanted), ("unwanted", other)):
            probes += [
                Probe("opinion", question, reply, group=group)
                for question, reply in self._asked(row, said[sentiment], sentiment)
            ]
        return Case(row.id("id"), (request,), tuple(probes))

    def _asked(self, row: Row, replies: Sequence[str], what: str) -> list[tuple[str, str]]:
        rng = self.drawn(row, f"replies {what}")
        replies = list(dict.fromkeys(replies))
        chosen = replies if self.replies is None else rng.sample(replies, min(self.replies, len(replies)))
        return [(rng.choice(QUESTIONS).replace("{}", self.about(row)), reply) for reply in chosen]

    def asked(self, row: Row, case: Case) -> tuple[str, str | None]:
        opinions = [probe for probe in case.probes if probe.kind == "opinion"]
        chosen = self.drawn(row, "as locality").choice(opinions)
        return chosen.prompt, chosen.target
