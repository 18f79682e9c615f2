"""What an edit of MLP output projections has changed: which keys fire at the edited subjects, which values moved and
what they promote since then, and its factors in words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edit_cli.edits import store as edit_store
from edit_cli.edits.low_rank import added, low_rank
from edit_cli.errors import RejectedRequest, UsageError
from edit_cli.inspection.layers import values_of
from edit_cli.inspection.vocabulary import Vocabulary
from edit_cli.lm.reading import HookPoint, read
from edit_cli.lm.tokenization import Row
from edit_cli.requests import EditRequest
from edit_cli.wording import many

if TYPE_CHECKING:
    from edit_cli.lm.model import LM

FACTORS = 3  # of an edited matrix that are told


@dataclass(frozen=True)
class Subject:
    """A fact, and where its prompt is read: at its subject's last token, or at the last token where none is named."""

    request: EditRequest
    row: Row
    position: int


@dataclass(frozen=True)
class Change:
    """Of one layer. update: (d, d_m). before, after: (n, d_m) coefficients at the subjects, without and with the edit.

    left: (r, d), right: (r, d_m): the largest factors, signed so that the subjects' keys lie along the right ones.
    """

    layer: int
    update: Tensor
    before: Tensor
    after: Tensor
    left: Tensor
    right: Tensor


def subjects(lm: LM, requests: Sequence[Mapping[str, Any]], most: int) -> list[Subject]:
    """The first facts of an edit, as its file tells them; those that cannot be read are left out."""
    found: list[Subject] = []
    for told in requests:
        if len(found) == most:
            break
        try:
            request = edit_store.request_of(told)
            (row,) = lm.head.encode([(request.text, None)])
            last = len(row.ids) - 1 if request.subject is None else row.token_at(request.subject_span[1] - 1)
        except RejectedRequest:
            continue
        found.append(Subject(request, row, last))
    return found


def changes(lm: LM, paths: Sequence[Path], edit: str, most: int) -> tuple[list[Subject], list[Change], list[str]]:
    """(facts, changed layers, other projections that are changed) of the edits in these directories, in order. The
    model is left unedited.

    Raises:
        UsageError: they change something else than projections, or no layer's MLP output. MissingError: made for
            another model.
    """
    manifests = [edit_store.read_manifest(path) for path in paths]
    found = subjects(lm, [request for manifest in manifests for request in manifest["requests"]], most)
    if not found:
        raise UsageError(f"edit={edit} tells of no fact that this model can read: name an edit with its facts")
    places = {lm.layout.mlp_out(layer): layer for layer in range(lm.layout.depth)}
    try:
        for path in paths:
            lm.attach(edit_store.load(path, lm))
        try:
            updates = added(lm)
        except UsageError as error:
            raise UsageError(f"edit={edit} cannot be told as values of memories: {error}") from None
        layers = {places[module]: module for module in updates if module in places}
        if not layers:
            raise UsageError(f"edit={edit} changes no MLP output projection, so it moves no value of a memory")
        after = _coefficients(lm, layers.values(), found)
    finally:
        while lm.attached:
            lm.detach()
    before = _coefficients(lm, layers.values(), found)
    told = []
    for layer in sorted(layers):
        factors = low_rank(updates[layers[layer]], FACTORS).factors
        left, right = factors.left.T.to(lm.device), factors.right.to(lm.device)
        along = (before[layers[layer]] @ right.T).sum(0)
        sign = torch.where(along < 0, -1.0, 1.0)[:, None]
        update = _dense(updates[layers[layer]]).to(lm.device)
        told.append(Change(layer, update, before[layers[layer]], after[layers[layer]], left * sign, right * sign))
    return found, told, sorted(module for module in updates if module not in places)


def _coefficients(lm: LM, modules: Any, found: Sequence[Subject]) -> dict[str, Tensor]:
    """{projection: (n, d_m) what enters it at the subjects}."""
    rows, positions = [one.row for one in found], [one.position for one in found]
    return {module: read(lm, rows, positions, [HookPoint(module, "input")])[0].float() for module in modules}


def _dense(update: Any) -> Tensor:
    return (update if isinstance(update, Tensor) else update.dense()).float()


def line_of(
    lm: LM,
    change: Change,
    found: Sequence[Subject],
    vocabulary: Vocabulary,
    shown: int,
    triggers: Sequence[Sequence[tuple[str, float]]],
) -> dict[str, Any]:
    """One changed layer. triggers: of each factor the texts whose keys lie along it most, with their products."""
    values = values_of(lm, change.layer)
    norms, moved = values.norm(dim=1), change.update.norm(dim=0)
    facts = []
    for number, subject in enumerate(found):
        before, after = change.before[number], change.after[number]
        fired = (before.abs() * norms).topk(min(shown, len(before))).indices.tolist()
        facts.append(
            {
                "request": {
                    "prompt": subject.request.prompt,
                    "subject": subject.request.subject,
                    "target_new": subject.request.target_new,
                    "target_true": subject.request.target_true,
                },
                "token": lm.tokenizer.decode([subject.row.ids[subject.position]]),
                "fired": [{"key": key, "before": before[key].item(), "after": after[key].item()} for key in fired],
                "promoted_before": vocabulary.told(before @ values, shown),
                "promoted_after": vocabulary.told(after @ (values + change.update.T), shown),
                "change_promotes": vocabulary.told(change.update @ after, shown),
            }
        )
    most = moved.topk(min(shown, len(moved))).indices.tolist()
    return {
        "facts": facts,
        "size": (change.update.norm() / values.norm()).item(),
        "values": [
            {
                "key": key,
                "moved": (moved[key] / norms[key].clamp_min(1e-12)).item(),
                "before": vocabulary.told(values[key], shown),
                "after": vocabulary.told(values[key] + change.update[:, key], shown),
            }
            for key in most
            if moved[key] > 0
        ],
        "factors": [
            {
                "size": (left.norm() * right.norm()).item(),
                "tokens": vocabulary.told(left, shown),
                "texts": list(texts),
            }
            for left, right, texts in zip(change.left, change.right, triggers, strict=True)
        ],
    }


def told_others(others: Sequence[str]) -> str:
    """What of an edit is not looked at."""
    some = ", ".join(others[:3]) + (", …" if len(others) > 3 else "")
    return f"the edit also changes {many(len(others), 'other projection')} ({some}), of which nothing is told"
