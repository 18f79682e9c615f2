"""Who proposes settings: Optuna's TPE, made again from the trials that a run holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edit_cli.errors import MissingError
from edit_cli.tuning.spaces import Space, proposed

if TYPE_CHECKING:
    from optuna.trial import Trial

AT_RANDOM = 5  # trials before the search learns from those that were made


def require_optuna() -> None:
    """Raises MissingError where the library is not installed."""
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise MissingError("tune needs optuna: pip install 'edit-cli[tune]'") from None


@dataclass
class Search:
    """Proposals for one space, each a function of the seed, its number and the trials before it: a search that was
    killed goes on as if it had not been.

    begin_with: parameters of the first trial, as far as they are known.
    """

    space: Space
    depth: int
    seed: int
    begin_with: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._study = optuna.create_study(direction="maximize")

    def recall(self, trials: Sequence[Mapping[str, Any]]) -> None:
        """Take up trials that were made before. Raises MissingError for one that this space never proposed."""
        from optuna.trial import FixedTrial, create_trial

        for trial in trials:
            known = FixedTrial(trial["parameters"])
            with suppress(ValueError, TypeError):
                if proposed(self.space, known, self.depth) == trial["settings"]:
                    self._study.add_trial(
                        create_trial(params=known.params, distributions=known.distributions, value=trial["objective"])
                    )
                    continue
            raise MissingError(
                f"trial {trial['trial']} of this run holds settings that are not searched: start with overwrite=true"
            )

    def ask(self, number: int) -> tuple[Trial, dict[str, Any]]:
        """(the trial, its settings)"""
        from optuna.samplers import TPESampler

        self._study.sampler = TPESampler(seed=self.seed + number, n_startup_trials=AT_RANDOM)
        if number == 0 and self.begin_with:
            self._study.enqueue_trial(dict(self.begin_with))
        trial = self._study.ask()
        return trial, proposed(self.space, trial, self.depth)

    def tell(self, trial: Trial, objective: float) -> None:
        """How good it was."""
        self._study.tell(trial, objective)
