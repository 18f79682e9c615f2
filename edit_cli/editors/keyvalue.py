"""What ROME, MEMIT, EMMET and their kin share: keys, current states, and writing one residual over several layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from edit_cli.edits import Factors, WeightDelta
from edit_cli.editors.base import Editor, require_layers
from edit_cli.editors.contexts import BARE, ContextOptions, Contexts, rows_in_contexts
from edit_cli.editors.solver import Covariance, similar_keys, solve
from edit_cli.editors.values import ValueOptions, Values, optimise_values
from edit_cli.errors import UsageError
from edit_cli.lm.model import LM
from edit_cli.lm.reading import Tap, read
from edit_cli.requests import EditRequest
from edit_cli.stats import MomentStore


@dataclass(kw_only=True)
class KeyValueEditor(Editor):
    """An editor that treats an MLP's output projection as a memory of keys and values.

    value, context: settings of the value optimisation and of the context prefixes. moments: where second moments come from.
    use_covariance: false takes C = I, as some published configurations do.
    """

    needs_subject = True

    value: ValueOptions = field(default_factory=ValueOptions)
    context: ContextOptions = field(default_factory=ContextOptions)
    moments: MomentStore = field(default_factory=MomentStore)
    use_covariance: bool = True

    def contexts(self, lm: LM) -> Contexts:
        """The context prefixes for this model, sampled once."""
        return _once(self.scratch(lm), "contexts", lambda: self.context.build(lm))

    def covariances(self, lm: LM, layers: Sequence[int]) -> dict[int, Covariance]:
        """Second moments of the unedited model, all missing layers filled in one pass over the text."""
        memory = self.scratch(lm)
        missing = [layer for layer in layers if ("covariance", layer) not in memory]
        if missing and self.use_covariance:
            with lm.monitor.phase("statistics"):
                self.moments.collect(lm, missing)
        for layer in missing:
            width = lm.key_width(layer)
            matrix = self.moments.second_moment(lm, layer).matrix if self.use_covariance else torch.eye(width, dtype=torch.float64)
            memory["covariance", layer] = Covariance(matrix.to(lm.device))
        return {layer: memory["covariance", layer] for layer in layers}

    def refuse_unwritable(self, lm: LM, layers: Sequence[int]) -> None:
        """Residuals measured on block outputs can be written to the projection only where its output is added as it is.

        Raises:
            UsageError: a post-norm block or a scaled residual.
        """
        for layer in layers:
            if not _once(self.scratch(lm), ("additive", layer), lambda layer=layer: lm.writes_are_additive(layer)):
                raise UsageError(
                    f"layer {layer} of {lm.name} normalises or scales its MLP's output before adding it to the residual stream, so a "
                    "residual of block outputs cannot be written to the projection; use method=rome, method=ft or method=lookup"
                )


def averaged_keys(lm: LM, requests: Sequence[EditRequest], layer: int, contexts: Contexts) -> Tensor:
    """Keys (m, n) float64: input of the layer's MLP projection at the subject's last token, averaged over contexts."""
    rows, positions = rows_in_contexts(lm, requests, contexts, with_target=False)
    (keys,) = read(lm, rows, positions, [Tap(lm.layout.mlp_out(layer), "input")])
    by_request = keys.double().view(len(requests), len(contexts.texts), -1)
    return torch.einsum("ncm,c->mn", by_request, contexts.weights.to(keys.device))


def current_states(lm: LM, requests: Sequence[EditRequest], layer: int) -> Tensor:
    """States (d, n) that leave block `layer` at the subject's last token of the bare prompts."""
    rows, positions = rows_in_contexts(lm, requests, BARE, with_target=False)
    (states,) = read(lm, rows, positions, [Tap(lm.layout.block(layer), "output")])
    return states.T


def spread(lm: LM, requests: Sequence[EditRequest], layers: Sequence[int], editor: KeyValueEditor, weight: float) -> WeightDelta:
    """MEMIT, Algorithm 1: optimise target states at the last layer, then write an equal share of what is left at each layer.

    Each layer's keys and remaining residual are read with the lower layers' updates attached. `weight` is λ of the solver.
    """
    layers = require_layers(layers, lm)
    editor.refuse_unwritable(lm, layers)
    contexts = editor.contexts(lm)
    covariances = editor.covariances(lm, layers)
    values = optimise_values(lm, requests, layers[-1], "block", editor.value, contexts)
    delta = WeightDelta(info=described(values, contexts))
    with ExitStack() as attached:
        for left, layer in countdown(layers):
            with lm.monitor.phase("keys"):
                keys = averaged_keys(lm, requests, layer, contexts)
                residual = values.target - current_states(lm, requests, layers[-1])
            if layer == layers[0]:
                note_similar(lm, requests, keys)
            with lm.monitor.phase("solve"):
                update = solve(residual.double() / left, keys, covariances[layer], weight)
            with lm.monitor.phase("apply"):
                step = written(lm, layer, update)
                delta.updates.update(step.updates)
                attached.enter_context(lm.edited(step))
            delta.info["residual_norms"][str(layer)] = float(residual.norm(dim=0).mean())
    return delta.compact(lm)


def written(lm: LM, layer: int, update: Factors) -> WeightDelta:
    """The update of one layer's MLP projection, in float32 factors, dense where that is smaller."""
    exact = torch.promote_types(lm.dtype, torch.float32)
    factors = Factors(update.left.to(exact), update.right.to(exact))
    return WeightDelta({f"{lm.layout.mlp_out(layer)}.weight": factors})


def countdown(layers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(how many layers are left, this one included; layer), lowest layer first."""
    return zip(range(len(layers), 0, -1), layers, strict=True)


def note_similar(lm: LM, requests: Sequence[EditRequest], keys: Tensor) -> None:
    """Say which facts share a key: only their average can be written."""
    pairs = similar_keys(keys)
    if pairs:
        first, second = (requests[i] for i in pairs[0])
        lm.monitor.note(
            f"{len(pairs)} pairs of facts have the same key, so only a mean of their values can be written, "
            f"such as {first.text!r} and {second.text!r}"
        )


def described(values: Values, contexts: Contexts) -> dict[str, Any]:
    """What an edit remembers of how it was made."""
    return {"prefixes": contexts.groups[1:], "losses": values.losses, "steps": values.steps, "residual_norms": {}}


def _once(memory: dict[Any, Any], key: Any, make: Callable[[], Any]) -> Any:
    if key not in memory:
        memory[key] = make()
    return memory[key]
