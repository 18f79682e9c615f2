"""Weight edits as low-rank factors, one pair a projection: what an adapter beside the untouched model can hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edit_cli.edits.edit import Edit, Factors, WeightDelta, WeightState
from edit_cli.errors import UsageError
from edit_cli.lm.hooks import exact
from edit_cli.lm.layout import is_projection, is_transposed
from edit_cli.lm.model import LM

TOLERANCE = 1e-6  # relative error of an update that is cut off by itself


@dataclass(frozen=True)
class LowRank:
    """Factors of one update in float32. error: ‖update − left · right‖ / ‖update‖ (Frobenius), rounding included."""

    factors: Factors
    error: float

    @property
    def told(self) -> str:
        """The error as a reader sees it."""
        return f"{self.error:.1e}" if self.error else "exact"


def added(lm: LM) -> dict[str, Factors | Tensor]:
    """What the attached weight edits add up to: {projection: (d_out, d_in), as factors where all of them are}.

    Raises:
        UsageError: an edit changes something else than the weights of projections; says what.
    """
    edits, parts = lm.attached, dict[str, list[Factors | Tensor]]()
    with lm.pristine():
        for edit in edits:
            for name, update in _updates(edit, lm).items():
                module = _projection(lm, name)
                stored = isinstance(update, Tensor) and is_transposed(lm.module(module))
                turned = update.T if stored and isinstance(update, Tensor) else update
                if isinstance(edit, WeightState):  # all that came before is in it
                    parts[module] = []
                parts.setdefault(module, []).append(turned)
    return {module: _sum(found) for module, found in parts.items()}


def low_rank(update: Factors | Tensor, rank: int | None = None) -> LowRank:
    """Factors of an update (d_out, d_in).

    Factors stay what they are, unless they have more than `rank` columns or more than the matrix can need. All else is
    cut off by SVD at `rank`, or where the error falls below `TOLERANCE`.
    """
    dense = _dense(update)
    if isinstance(update, Factors) and update.rank <= min(*dense.shape, rank or update.rank):
        found = update
    else:
        found = _cut(update, rank)
    found = Factors(found.left.float(), found.right.float())
    size = float(dense.norm())
    missing = float((dense - found.left.double() @ found.right.double()).norm())
    return LowRank(found, missing / size if size else 0.0)


def _cut(update: Factors | Tensor, rank: int | None) -> Factors:
    """The best factors of at most `rank`. Those of a matrix that comes in factors are found in their span."""
    if isinstance(update, Factors):
        (rows, left), (columns, right) = (
            torch.linalg.qr(part) for part in (update.left.double(), update.right.double().T)
        )
        u, sizes, v = torch.linalg.svd(left @ right.T, full_matrices=False)
        u, v = rows @ u, v @ columns.T
    else:
        u, sizes, v = torch.linalg.svd(update.double(), full_matrices=False)
    beyond = sizes.square().flip(0).cumsum(0).flip(0).sqrt()  # what is lost by keeping only those before each
    needed = max(int((beyond > TOLERANCE * beyond[0]).sum()), 1)
    kept = needed if rank is None else min(rank, needed)
    share = sizes[:kept].sqrt()
    return Factors(u[:, :kept] * share, share[:, None] * v[:kept])


def _updates(edit: Edit, lm: LM) -> dict[str, Factors | Tensor]:
    """{parameter: factors, or a dense update as the parameter is stored} of an edit; the model is unedited."""
    if isinstance(edit, WeightDelta):
        return dict(edit.updates)
    if isinstance(edit, WeightState):
        return {name: value - exact(lm.access(name).value()).to(value) for name, value in edit.values.items()}
    raise UsageError(f"it is of the kind {edit.kind} and no change of weights")


def _projection(lm: LM, parameter: str) -> str:
    """The module whose weight the parameter is.

    Raises:
        UsageError: it is none of a projection, or one that other parts of the model share.
    """
    module, _, own = parameter.rpartition(".")
    if own != "weight" or not is_projection(lm.module(module)):
        raise UsageError(f"it changes {parameter}, which is no weight matrix of a Linear or Conv1D layer")
    tied = getattr(lm.model, "all_tied_weights_keys", None) or {}
    if parameter in (*tied, *tied.values()):
        raise UsageError(f"it changes {parameter}, which the model uses in two places")
    return module


def _sum(parts: Sequence[Factors | Tensor]) -> Factors | Tensor:
    factors = [part for part in parts if isinstance(part, Factors)]
    if len(factors) == 1 == len(parts):
        return factors[0]
    if len(factors) == len(parts):
        return Factors(torch.cat([part.left for part in factors], 1), torch.cat([part.right for part in factors]))
    return sum(map(_dense, parts[1:]), _dense(parts[0]))


def _dense(update: Factors | Tensor) -> Tensor:
    """(d_out, d_in) in float64."""
    return update.left.double() @ update.right.double() if isinstance(update, Factors) else update.double()
