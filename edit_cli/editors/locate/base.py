"""What ROME, MEMIT, EMMET and their kin share: contexts, second moments, keys and states, and what is done to a
finished update.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, ClassVar, TypeVar

import torch
from annotated_types import Gt
from torch import Tensor

from edit_cli.config.schema import Layers, Linked, NonNegative, Share
from edit_cli.editors.base import Context, Editor, EditorConfig, require_layers
from edit_cli.editors.cost import Cost
from edit_cli.editors.locate.context_prefixes import BARE, ContextConfig, Contexts, rows_in_contexts, sample_contexts
from edit_cli.editors.locate.regularizers import prune, rect
from edit_cli.editors.locate.solver import Covariance, ScaledIdentity
from edit_cli.editors.locate.value_optimization import Site, ValueConfig, Values, shifted_modules
from edit_cli.edits.diagnosis import Diagnosis
from edit_cli.edits.edit import Factors, WeightDelta
from edit_cli.errors import MissingError
from edit_cli.lm.model import LM
from edit_cli.lm.outline import Outline
from edit_cli.lm.reading import HookPoint, LayerwiseReader
from edit_cli.requests import EditRequest
from edit_cli.statistics.moments import MomentStore

VALUE_TOKENS = 512  # of a step of the values, on a processor
CHUNK = 512  # requests whose keys are read at once: bounds memory, 10,000 requests have 60,000 rows


@dataclass(frozen=True, kw_only=True)
class LocateConfig(EditorConfig):
    """Settings that all methods of the family share."""

    layers: Layers
    """MLP layers that are written to; conf/tuned/METHOD/MODEL.yaml has the published ones."""
    value: ValueConfig = field(default_factory=ValueConfig)
    """The optimization of target values."""
    context: ContextConfig = field(default_factory=ContextConfig)
    """Texts put before the prompt, so that an edit does not hang on one wording."""
    moments: Annotated[MomentStore, Linked("${stats}")] = field(default_factory=MomentStore)
    """Second moments of the keys; see `edit-cli precompute-stats`."""
    use_covariance: bool = True
    """Whether old keys count by their second moment; false takes C = I, as some published configurations do."""
    norm_weight: NonNegative = 0.0
    """λ_n: what the norm of an update costs beside old keys (ENCORE's norm constraint)."""
    rect: Share | None = None
    """Share of an update's entries that is kept, those that change their weight most relatively (RECT), such as 0.4."""
    prune: Annotated[float, Gt(1)] | None = None
    """Base of the logarithm by which large singular values of an update are damped (PRUNE), such as 1.2."""


L = TypeVar("L", bound=LocateConfig)


class LocateEditor(Editor[L]):
    """An editor that treats an MLP's output projection as a memory of keys and values."""

    needs_subject = True
    softer: ClassVar[str] = ""  # what lets more of the new values through, in words

    @classmethod
    def require(cls, config: L, model: str, context: Context) -> None:
        if config.use_covariance:
            try:
                config.moments.require(model, config.layers)
            except MissingError as error:
                raise MissingError(f"{error}; or do without second moments: method.use_covariance=false") from None

    @classmethod
    def cost(cls, config: L, outline: Outline, lengths: Sequence[int]) -> Cost | None:
        """Of the values, whose rows are run from the subject on, forward and backward, in the blocks above; and of what
        is solved: C, its factor, and the keys of all facts.
        """
        if not config.layers:
            return None
        last, rows = max(config.layers), 1 + config.context.count
        above = 1 - (last + 1) / outline.depth
        tokens = sum(lengths) * 0.5  # the subject and what stands before it are kept
        optimized = 3 * config.value.steps * (rows + 1) * tokens * max(above, 1 / outline.depth)
        read = rows * sum(lengths) * (last + 1) / outline.depth * 2
        budget = config.value.batch_tokens or VALUE_TOKENS
        steps = 3 * config.value.steps * max(1.0, (rows + 1) * tokens / budget)
        at_once = min(budget, (rows + 1) * tokens)
        widths = [outline.key_width(layer) for layer in config.layers]
        matrices = sum(2 * m * m * 8 for m in widths) if config.use_covariance else 0
        solved = max(widths) * len(lengths) * 8 * 3
        graph = at_once * (8 * outline.layout.width + 4 * outline.inner) * outline.depth * above * 4
        words = at_once * outline.vocabulary * 4 * 0.5
        return Cost(optimized + read, round(steps), round(matrices + solved + max(graph + words, 0)), "values, keys, C")

    def warm_up(self) -> None:
        """Second moments of all layers, in one pass over the text."""
        if self.config.use_covariance:
            self.config.moments.collect(self.lm, self.layers)

    @property
    def layers(self) -> list[int]:
        """The layers that are written to, lowest first. Raises UsageError if there are none."""
        return require_layers(self.config.layers, self.lm)

    @property
    def contexts(self) -> Contexts:
        """The context prefixes for this model, sampled once."""
        return self.context.once("contexts", lambda: sample_contexts(self.lm, self.config.context))

    def covariances(self, layers: Sequence[int], ridge: float = 0.0) -> dict[int, Covariance]:
        """C + ridge · I of the unedited model, all missing layers filled in one pass over the text."""
        missing = [layer for layer in layers if ("covariance", layer, ridge) not in self.context.kept]
        if missing and self.config.use_covariance:
            with self.lm.monitor.phase("statistics"):
                self.config.moments.collect(self.lm, missing)
        return {
            layer: self.context.once(("covariance", layer, ridge), partial(self._covariance, layer, ridge))
            for layer in layers
        }

    def _covariance(self, layer: int, ridge: float) -> Covariance:
        if not self.config.use_covariance:
            return ScaledIdentity(self.lm.key_width(layer), self.lm.device, 1.0 + ridge)
        matrix = self.config.moments.second_moment(self.lm, layer).matrix.to(self.lm.device)
        return Covariance(
            matrix + ridge * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device) if ridge else matrix
        )

    def additive(self, layers: Sequence[int]) -> bool:
        """Whether what the projections of these layers write reaches the residual stream as it is: nothing normalizes
        or scales it on the way.
        """
        return all(
            self.context.once(("additive", layer), partial(self.lm.writes_are_additive, layer)) for layer in layers
        )

    def diagnosis(self, *found: Values, written: float | None = None) -> Diagnosis:
        """How the search for values went, and which key to turn."""
        options = self.config.value
        missed = clamped = 0
        for values in found:
            moved = (values.target - values.initial).norm(dim=0) / values.initial.norm(dim=0)
            for reached, length in zip(values.reached, moved.tolist(), strict=True):
                missed += not reached
                clamped += not reached and length > 0.99 * options.clamp_norm_factor
        optimized = sum(len(each.reached) for each in found)
        key = "clamp_norm_factor" if clamped > missed / 2 else "steps"
        keys = {"reached": f"raise method.value.{key}", "size": "lower method.value.clamp_norm_factor"}
        said: Diagnosis = {"values": optimized, "reached": optimized - missed, "keys": keys}
        if taken := sum(sum(values.taken) for values in found):
            said["taken"] = taken
        if written is not None:
            said["written"], keys["written"] = written, self.softer
        return said

    def finished(self, delta: WeightDelta) -> WeightDelta:
        """The update as it will be attached: damped, sparsified, each if asked for, and stored in the smaller form."""
        if self.config.prune is not None:
            delta = prune(self.lm, delta, self.config.prune)
        if self.config.rect is not None:
            delta = rect(self.lm, delta, self.config.rect)
        return delta.compact(self.lm)


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
        self.prefixed = self._readers(requests, contexts)
        self.bare = self._readers([requests[group[0]] for group in self.groups], BARE)

    def _readers(self, requests: Sequence[EditRequest], contexts: Contexts) -> list[LayerwiseReader]:
        """This process's share, by chunks."""
        mine = self.lm.process_group.share(requests)
        chunks = [mine[first : first + CHUNK] for first in range(0, len(mine), CHUNK)]
        return [
            LayerwiseReader(self.lm, *rows_in_contexts(self.lm, chunk, contexts, with_target=False)) for chunk in chunks
        ]

    def _read(self, readers: Sequence[LayerwiseReader], layer: int, point: HookPoint) -> Iterator[Tensor]:
        """(rows, width) of each reader, blocks below `layer` being done with."""
        for reader in readers:
            reader.start_at(layer)
            yield reader.read([point])[0]

    def _together(self, mine: Sequence[Tensor]) -> Tensor:
        """(width, n): what all processes read of their shares."""
        return torch.stack(self.lm.process_group.gather([row.cpu() for row in mine]), dim=1).to(self.lm.device)

    def keys(self, layer: int) -> Tensor:
        """Keys (m, groups) float64: input of the layer's MLP projection, averaged over contexts."""
        weights = self.contexts.weights
        mine: list[Tensor] = []
        for keys in self._read(self.prefixed, layer, HookPoint(self.lm.layout.mlp_out(layer), "input")):
            by_request = keys.double().view(-1, len(weights), keys.shape[1])
            mine += torch.einsum("ncm,c->nm", by_request, weights.to(keys.device))
        single = self._together(mine)
        return torch.stack([single[:, group].mean(dim=1) for group in self.groups], dim=1)

    def states(self, layer: int, last: int, site: Site) -> Tensor:
        """States (d, groups) at `site` of layer `last`, of the bare prompts; blocks below `layer` are taken as done
        with.
        """
        point = HookPoint(shifted_modules(self.lm, last, site)[0], "output")
        return self._together([row for states in self._read(self.bare, layer, point) for row in states])


def averaged_keys(lm: LM, requests: Sequence[EditRequest], layer: int, contexts: Contexts) -> Tensor:
    """Keys (m, n) float64 of one layer alone."""
    return Subjects(lm, requests, contexts).keys(layer)


def written(lm: LM, layer: int, update: Factors) -> WeightDelta:
    """The update of one layer's MLP projection, in float32 factors."""
    exact = torch.promote_types(lm.dtype, torch.float32)
    factors = Factors(update.left.to(exact), update.right.to(exact))
    return WeightDelta({f"{lm.layout.mlp_out(layer)}.weight": factors})
