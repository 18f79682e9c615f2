"""Fine-tunings that know nothing of each other, side by side: each row of a batch computes with the matrices of its own
edit.

No edit's loss depends on another's matrices, and Adam moves each number by itself. So all share the passes and the
steps, and each comes out as it would alone but for last digits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from edit_cli.editors.finetune.base import FinetuneEditor, Tuned
from edit_cli.editors.passes import RepeatedBatches, packed, row_losses
from edit_cli.lm.fast.repeated_pass import KEPT
from edit_cli.lm.hooks import exact, unwrapped
from edit_cli.lm.layout import is_projection, is_transposed
from edit_cli.lm.weights.access import DeviceWeight

Trained = tuple[list[Tuned], list[float]]  # the weights of an edit, and its mean loss at each pass
COPIES = 6  # of a tuned matrix in float32: itself, its gradient, Adam's two, and both again in the batch


def train_each(
    editor: FinetuneEditor[Any],
    tasks: Sequence[Sequence[Any]],
    most: int,
    stop_loss: float,
    weight_decay: float = 0.0,
) -> list[Trained] | None:
    """Train on the rows of each task by itself, as `FinetuneEditor.fit` does where one batch holds them all.

    Args:
        editor: says what is tuned, how, and by which answers.
        tasks: the encoded rows of each edit.
        most: rows in a pass, but for an edit that has more.
        stop_loss: mean loss in nats below which an edit is finished.
        weight_decay: of Adam.

    Returns:
        None where rows cannot compute with matrices of their own: what is tuned is no projection, or lies off the
        device; or where not even two of them fit into memory.
    """
    lm, names = editor.lm, editor.names
    accesses = [lm.access(name) for name in names]
    owners = [lm.module(name.removesuffix(".weight")) for name in names]
    if not all(map(is_projection, owners)) or not all(isinstance(access, DeviceWeight) for access in accesses):
        return None
    starts = [
        exact(lm.masters[name] if name in lm.masters else access.value()).clone()
        for name, access in zip(names, accesses, strict=True)
    ]
    at_once = KEPT // (4 * COPIES * sum(start.numel() for start in starts))
    if at_once < 2:
        return None

    def weights() -> list[Tuned]:
        copies = [start.clone().requires_grad_() for start in starts]
        return [
            Tuned(name, access, start, own, present=own)
            for name, access, start, own in zip(names, accesses, starts, copies, strict=True)
        ]

    found: list[Trained] = []
    for some in packed(tasks, most, at_once):
        edits: list[Trained] = [(weights(), []) for _ in some]
        _train(editor, owners, some, edits, stop_loss, weight_decay)
        found += edits
    return found


def _train(
    editor: FinetuneEditor[Any],
    owners: Sequence[nn.Module],
    tasks: Sequence[Sequence[Any]],
    edits: Sequence[Trained],
    stop_loss: float,
    weight_decay: float,
) -> None:
    """Move the weights of all edits to where they end, in place."""
    optimizer = torch.optim.Adam(
        [weight.tuned for weights, _ in edits for weight in weights], lr=editor.config.lr, weight_decay=weight_decay
    )
    left, answers = list(range(len(edits))), _answers(editor, tasks, range(len(tasks)))
    for _ in editor.lm.monitor.counted("fine-tuning", editor.config.steps):
        tuned = [[weight.tuned for weight in edits[number][0]] for number in left]
        sizes = torch.tensor([len(tasks[number]) for number in left])
        with _own_matrices(owners, list(zip(*tuned, strict=True)), sizes):
            by_row = row_losses(answers(), int(sizes.sum()))
        means = torch.stack([part.mean() for part in by_row.split(sizes.tolist())])
        optimizer.zero_grad()  # those that are finished have none, and are left alone
        going = []
        for number, loss in zip(left, means.tolist(), strict=True):
            edits[number][1].append(loss)
            if not loss < stop_loss:
                going.append(number)
        if not going:
            return
        still = means[[number in going for number in left]].sum()
        of = [weight.tuned for number in going for weight in edits[number][0]]
        for weight, gradient in zip(of, torch.autograd.grad(still, of), strict=True):
            weight.grad = gradient
        optimizer.step()
        with torch.no_grad():
            for number in going:
                editor.project(edits[number][0])
        if going != left:
            left, answers = going, _answers(editor, tasks, going)


def _answers(editor: FinetuneEditor[Any], tasks: Sequence[Sequence[Any]], numbers: Sequence[int]) -> Callable[[], Any]:
    """What gives the scores of these tasks' rows; blocks below the tuned ones are run once."""
    run = partial(editor.answers, [row for number in numbers for row in tasks[number]])
    if min(editor.config.layers) == 0:
        return run
    return partial(RepeatedBatches(editor.lm, editor.lowest).answers, 0, run)


@contextmanager
def _own_matrices(owners: Sequence[nn.Module], matrices: Sequence[Sequence[Tensor]], sizes: Tensor) -> Iterator[None]:
    """Let the rows of a pass compute with matrices of their own.

    Args:
        owners: the projections.
        matrices: of each projection those of the edits, oriented as it stores its own.
        sizes: (edits,) rows of each edit, which follow each other.
    """
    of_row = torch.arange(len(sizes)).repeat_interleave(sizes)

    def computed(own: Tensor, bias: Any, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        states = args[0].reshape(len(of_row), -1, own.shape[1])
        found = states @ own.to(states.dtype)
        return (found if bias is None else found + bias).reshape(output.shape)

    with ExitStack() as stack:
        for owner, each in zip(owners, matrices, strict=True):
            stacked = torch.stack([matrix if is_transposed(owner) else matrix.T for matrix in each])
            own = stacked if len(of_row) == len(each) else stacked[of_row.to(stacked.device)]  # (rows, d_in, d_out)
            hook = partial(computed, own, unwrapped(owner).bias)
            stack.callback(owner.register_forward_hook(hook).remove)
        yield
