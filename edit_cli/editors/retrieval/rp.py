"""RP: SERAC without its counterfactual model. The fact that the scope classifier finds is put before the prompt, and
the model itself answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from edit_cli.config.schema import Sentence
from edit_cli.editors.meta.base import NotInRecipe
from edit_cli.editors.retrieval.base import Fact, FactsSaid, check_template, prompted, told
from edit_cli.editors.retrieval.serac import SERAC, SERACConfig, SeracRoute
from edit_cli.lm.model import LM
from edit_cli.lm.routing import Answerer, Destination
from edit_cli.requests import EditRequest


@dataclass(frozen=True, kw_only=True)
class RPConfig(SERACConfig):
    """Settings of retrieve-and-prompt; `counterfactual` and `mixing` only say whose training is looked up."""

    template: Annotated[Sentence | None, NotInRecipe] = None
    """What the model reads: {fact} is prompt and new answer; null: what SERAC's counterfactual model reads (`join`), as
    published."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.template is not None:
            check_template(self, "template")

    def read(self, fact: Fact, prompt: str) -> str:
        """What the model reads in the counterfactual one's place."""
        return super().read(fact, prompt) if self.template is None else told(self.template, fact.text, prompt)


class RP(SERAC):
    """Retrieve and prompt (the ablation of Mitchell et al., 2022): what was trained for SERAC decides."""

    Config = RPConfig
    config: RPConfig

    @classmethod
    def kind(cls, config: SERACConfig) -> dict[str, Any]:
        """A checkpoint is SERAC's."""
        return SERAC.kind(config)

    def edit(self, requests: Sequence[EditRequest]) -> RpRoute:
        """The facts and their embeddings; the model is not touched."""
        return RpRoute(*self.remembered(requests))


class RpSaid(FactsSaid):
    """editor: the settings that the edit was made with."""

    editor: RPConfig
    train_command: str | None


class RpRoute(SeracRoute):
    """Facts in front of a model that is told the one whose scope a prompt is in."""

    said: ClassVar[Any] = RpSaid
    Settings = RPConfig
    config: RPConfig

    def attach(self, lm: LM) -> Any:
        self.lm = lm
        return super().attach(lm)

    def answers(self, below: Answerer, prompts: Sequence[str]) -> list[Destination | None]:
        net: Any = self.net
        shares, best = (values.tolist() for values in net.scope.best(self.memory, prompts))
        found: dict[str, Fact | None] = {
            prompt: self.memory.facts[i] if g > self.config.threshold else None
            for prompt, g, i in zip(prompts, shares, best, strict=True)
        }
        return prompted(below, self.lm.head, found, lambda fact, prompt, room: self.config.read(fact, prompt))
