"""The plain path: value optimisation of one edit with the whole model at every step, as the papers' code does it."""

from __future__ import annotations

import torch
from torch import Tensor

from edit_cli.editors.contexts import Contexts
from edit_cli.editors.values import Site, ValueOptions
from edit_cli.lm.hooks import on_output
from edit_cli.lm.model import LM
from edit_cli.requests import EditRequest


def plain_value(
    lm: LM, request: EditRequest, layer: int, site: Site, options: ValueOptions, contexts: Contexts
) -> tuple[Tensor, int, float]:
    """(target state (d,), forward passes, final loss). One row at a time, no padding, no truncation, torch's own Adam."""
    module = lm.module(lm.layout.block(layer) if site == "block" else lm.layout.mlp_out(layer))
    start, end = request.subject_span
    rows = []
    for prefix in contexts.texts:
        row = lm.head.encode([(prefix + request.text, request.target_new)])[0]
        rows.append((torch.tensor([row.ids]), row.token_at(len(prefix) + end - 1), row.start, row.target))
    kl_text = options.kl_prompt.replace("{}", request.subject)
    kl_row = lm.head.encode([(kl_text, None)])[0]
    kl_ids, kl_at = torch.tensor([kl_row.ids]), kl_row.token_at(len(request.subject) - 1)
    kl_read = kl_at if options.kl_position == "subject" else len(kl_row.ids) - 1

    def run(ids: Tensor, at: int, shift: Tensor | None) -> tuple[Tensor, Tensor]:
        seen = []

        def change(hidden: Tensor) -> Tensor:
            seen.append(hidden[0, at].detach().clone())
            moved = hidden.clone()
            if shift is not None:
                moved[0, at] += shift.to(hidden)
            return moved

        with on_output(module, change, rows=1):
            logits = lm.model(input_ids=ids, use_cache=False).logits[0]
        return logits.log_softmax(-1), seen[0]

    with torch.no_grad():
        bare = lm.head.encode([(request.text, None)])[0]
        _, initial = run(torch.tensor([bare.ids]), bare.token_at(end - 1), None)
        base = run(kl_ids, kl_at, None)[0][kl_read]
    shift = torch.zeros_like(initial, requires_grad=True)
    optimizer = torch.optim.Adam([shift], lr=options.lr)
    for step in range(options.steps):
        losses = []
        for ids, at, first, target in rows:
            log_probs, _ = run(ids, at, shift)
            losses.append(-sum(log_probs[first - 1 + j, t] for j, t in enumerate(target)) / len(target))
        edited = run(kl_ids, kl_at, shift)[0][kl_read]
        divergence = (edited.exp() * (edited - base)).sum()
        loss = sum(losses) / len(losses) + options.kl_factor * divergence
        loss = loss + options.weight_decay * shift.norm() / initial.norm() ** 2
        if loss < options.stop_loss or step == options.steps - 1:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            limit = options.clamp_norm_factor * initial.norm()
            if shift.norm() > limit:
                shift.mul_(limit / shift.norm())
    return (initial + shift).detach(), step + 1, loss.item()
