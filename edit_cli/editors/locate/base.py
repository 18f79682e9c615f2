"""What ROME, MEMIT, EMMET and their kin share: contexts, second moments, keys and states, and what is done to a
finished update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from edit_cli.editors.base import Editor, require_layers
from edit_cli.editors.locate.context_prefixes import BARE, ContextOptions, Contexts, rows_in_contexts
from edit_cli.editors.locate.regularizers import prune, rect
from edit_cli.editors.locate.solver import Covariance, ScaledIdentity
from edit_cli.editors.locate.value_optimization import Site, ValueOptions, shifted_modules
from edit_cli.edits.edit import Factors, WeightDelta
from edit_cli.errors import MissingError, UsageError
from edit_cli.lm.model import LM
from edit_cli.lm.reading import Ascent, Tap
from edit_cli.requests import EditRequest
from edit_cli.statistics.moments import MomentStore

CHUNK = 512  # requests whose keys are read at once: bounds memory, 10,000 requests have 60,000 rows


@dataclass(kw_only=True)
class KeyValueEditor(Editor):
    """An editor that treats an MLP's output projection as a memory of keys and values.

    value, context: settings of the value optimisation and of the context prefixes. moments: where second moments come
    from.
    use_covariance: false takes C = I, as some published configurations do.
    norm_weight: λ_n, how much the norm of an update costs beside old keys (ENCORE).
    rect: share of an update's entries that is kept, those that change their weight most, relatively (RECT).
    prune: base of the logarithm by which large singular values of an update are damped (PRUNE).
    """

    needs_subject = True

    value: ValueOptions = field(default_factory=ValueOptions)
    context: ContextOptions = field(default_factory=ContextOptions)
    moments: MomentStore = field(default_factory=MomentStore)
    use_covariance: bool = True
    norm_weight: float = 0.0
    rect: float | None = None
    prune: float | None = None

    def __post_init__(self) -> None:
        if self.norm_weight < 0:
            raise UsageError(f"method.norm_weight={self.norm_weight}: give 0 or more")
        if self.rect is not None and not 0 < self.rect <= 1:
            raise UsageError(
                f"method.rect={self.rect}: give the share of entries to keep, above 0 and up to 1, or null"
            )
        if self.prune is not None and self.prune <= 1:
            raise UsageError(f"method.prune={self.prune}: give the base of a logarithm, above 1, or null")

    def require(self, model: str) -> None:
        if self.use_covariance:
            try:
                self.moments.require(model, getattr(self, "layers", ()))
            except MissingError as error:
                raise MissingError(f"{error}; or do without second moments: method.use_covariance=false") from None

    def warm_up(self, lm: LM) -> None:
        """Second moments of all layers, in one pass over the text."""
        if self.use_covariance:
            self.moments.collect(lm, require_layers(self.layers, lm))

    def contexts(self, lm: LM) -> Contexts:
        """The context prefixes for this model, sampled once."""
        return once(self.scratch(lm), "contexts", lambda: self.context.build(lm))

    def covariances(self, lm: LM, layers: Sequence[int], ridge: float = 0.0) -> dict[int, Covariance]:
        """C + ridge · I of the unedited model, all missing layers filled in one pass over the text."""
        memory = self.scratch(lm)
        missing = [layer for layer in layers if ("covariance", layer, ridge) not in memory]
        if missing and self.use_covariance:
            with lm.monitor.phase("statistics"):
                self.moments.collect(lm, missing)
        for layer in missing:
            memory["covariance", layer, ridge] = self._covariance(lm, layer, ridge)
        return {layer: memory["covariance", layer, ridge] for layer in layers}

    def _covariance(self, lm: LM, layer: int, ridge: float) -> Covariance:
        if not self.use_covariance:
            return ScaledIdentity(lm.key_width(layer), lm.device, 1.0 + ridge)
        matrix = self.moments.second_moment(lm, layer).matrix.to(lm.device)
        return Covariance(
            matrix + ridge * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device) if ridge else matrix
        )

    def refuse_unwritable(self, lm: LM, layers: Sequence[int]) -> None:
        """Residuals measured on block outputs can be written to the projection only where its output is added as it is.

        Raises:
            UsageError: a post-norm block or a scaled residual.
        """
        for layer in layers:
            if not once(self.scratch(lm), ("additive", layer), lambda layer=layer: lm.writes_are_additive(layer)):
                raise UsageError(
                    f"layer {layer} of {lm.name} normalises or scales its MLP's output before adding it to the residual"
                    " stream, so a residual of block outputs cannot be written to the projection; use method=rome,"
                    " method=ft or method=lookup"
                )

    def finished(self, lm: LM, delta: WeightDelta) -> WeightDelta:
        """The update as it will be attached: damped, sparsified, each if asked for, and stored in the smaller form."""
        if self.prune is not None:
            delta = prune(lm, delta, self.prune)
        if self.rect is not None:
            delta = rect(lm, delta, self.rect)
        return delta.compact(lm)


class Subjects:
    """Requests, read at their subjects' last tokens at one layer after another, upwards; lower layers are not run
    again.

    groups: indices of requests that share one key and one state, null for each its own. A group's key is the mean over
    its requests (they agree where the subject begins the prompt), its state that of the first one.
    """

    def __init__(
        self, lm: LM, requests: Sequence[EditRequest], contexts: Contexts, groups: Sequence[Sequence[int]] | None = None
    ) -> None:
        self.lm, self.contexts = lm, contexts
        self.groups = groups or [[i] for i in range(len(requests))]
        self.prefixed = self._ascents(requests, contexts)
        self.bare = self._ascents([requests[group[0]] for group in self.groups], BARE)

    def _ascents(self, requests: Sequence[EditRequest], contexts: Contexts) -> list[Ascent]:
        """This process's share, by chunks."""
        mine = self.lm.team.share(requests)
        chunks = [mine[first : first + CHUNK] for first in range(0, len(mine), CHUNK)]
        return [Ascent(self.lm, *rows_in_contexts(self.lm, chunk, contexts, with_target=False)) for chunk in chunks]

    def _read(self, ascents: Sequence[Ascent], layer: int, tap: Tap) -> Iterator[Tensor]:
        """(rows, width) of each ascent, blocks below `layer` being done with."""
        for ascent in ascents:
            ascent.climb(layer)
            yield ascent.read([tap])[0]

    def _together(self, mine: Sequence[Tensor]) -> Tensor:
        """(width, n): what all processes read of their shares."""
        return torch.stack(self.lm.team.gather([row.cpu() for row in mine]), dim=1).to(self.lm.device)

    def keys(self, layer: int) -> Tensor:
        """Keys (m, groups) float64: input of the layer's MLP projection, averaged over contexts."""
        weights, mine = self.contexts.weights, []
        for keys in self._read(self.prefixed, layer, Tap(self.lm.layout.mlp_out(layer), "input")):
            by_request = keys.double().view(-1, len(weights), keys.shape[1])
            mine += torch.einsum("ncm,c->nm", by_request, weights.to(keys.device))
        single = self._together(mine)
        return torch.stack([single[:, group].mean(dim=1) for group in self.groups], dim=1)

    def states(self, layer: int, site: Site, last: int) -> Tensor:
        """States (d, groups) at `site` of layer `last`, of the bare prompts; blocks below `layer` are taken as done
        with.
        """
        tap = Tap(shifted_modules(self.lm, last, site)[0], "output")
        return self._together([row for states in self._read(self.bare, layer, tap) for row in states])


def averaged_keys(lm: LM, requests: Sequence[EditRequest], layer: int, contexts: Contexts) -> Tensor:
    """Keys (m, n) float64 of one layer alone."""
    return Subjects(lm, requests, contexts).keys(layer)


def written(lm: LM, layer: int, update: Factors) -> WeightDelta:
    """The update of one layer's MLP projection, in float32 factors."""
    exact = torch.promote_types(lm.dtype, torch.float32)
    factors = Factors(update.left.to(exact), update.right.to(exact))
    return WeightDelta({f"{lm.layout.mlp_out(layer)}.weight": factors})


def once(memory: dict[Any, Any], key: Any, make: Callable[[], Any]) -> Any:
    """memory[key], made at the first time."""
    if key not in memory:
        memory[key] = make()
    return memory[key]
