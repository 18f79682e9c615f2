"""The plain path of MEMIT and its scores: one edit and one row at a time with the whole model, as the papers' code
does it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import numpy as np
import torch
from torch import Tensor

from edit_cli.editors.locate.context_prefixes import Contexts
from edit_cli.editors.locate.value_batch import ValueConfig
from edit_cli.editors.locate.value_optimization import Site, shifted_modules
from edit_cli.lm.hooks import on_input, on_output
from edit_cli.lm.layout import is_transposed
from edit_cli.lm.model import LM
from edit_cli.requests import Case, EditRequest


def plain_value(
    lm: LM,
    request: EditRequest | Sequence[EditRequest],
    layer: int,
    site: Site,
    options: ValueConfig,
    contexts: Contexts,
) -> tuple[Tensor, int, float]:
    """(target state (d,), forward passes, final loss). One row at a time, no padding, no truncation, torch's own Adam.

    Several requests share one shift, and the mean of their losses is minimized.
    """
    requests = [request] if isinstance(request, EditRequest) else request
    modules = [lm.module(name) for name in shifted_modules(lm, layer, site)]
    rows = []
    for request in requests:
        start, end = request.subject_span
        for prefix in contexts.texts:
            row = lm.head.encode([(prefix + request.text, request.target_new)])[0]
            rows.append((torch.tensor([row.ids]), row.token_at(len(prefix) + end - 1), row.start, row.target))
    first = requests[0]
    assert first.subject is not None
    kl_text = options.kl_prompt.replace("{}", first.subject)
    kl_row = lm.head.encode([(kl_text, None)])[0]
    kl_ids, kl_at = torch.tensor([kl_row.ids]), kl_row.token_at(len(first.subject) - 1)
    kl_read = kl_at if options.kl_position == "subject" else len(kl_row.ids) - 1

    def run(ids: Tensor, at: int, shifts: list[Tensor] | None) -> tuple[Tensor, Tensor]:
        seen = {}

        def change(hidden: Tensor, place: int) -> Tensor:
            seen[place] = hidden[0, at].detach().clone()
            moved = hidden.clone()
            if shifts is not None:
                moved[0, at] += shifts[place].to(hidden)
            return moved

        with ExitStack() as stack:
            for place, module in enumerate(modules):
                stack.enter_context(on_output(module, partial(change, place=place), rows=1))
            logits = lm.model(input_ids=ids, use_cache=False).logits[0]
        return logits.log_softmax(-1), torch.stack([seen[place] for place in range(len(modules))])

    with torch.no_grad():
        bare = lm.head.encode([(first.text, None)])[0]
        _, initial = run(torch.tensor([bare.ids]), bare.token_at(first.subject_span[1] - 1), None)
        base = run(kl_ids, kl_at, None)[0][kl_read]
    shifts = [torch.zeros_like(state, requires_grad=True) for state in initial]
    optimizer = torch.optim.Adam(shifts, lr=options.lr)
    factor, passes_hit = 1.0, 0
    for step in range(options.steps):
        losses, hit = [], True
        for ids, at, begin, target in rows:
            log_probs, _ = run(ids, at, shifts)
            losses.append(-sum(log_probs[begin - 1 + j, t] for j, t in enumerate(target)) / len(target))
            hit = hit and all(log_probs[begin - 1 + j].argmax() == t for j, t in enumerate(target))
        edited = run(kl_ids, kl_at, shifts)[0][kl_read]
        kl_term = options.kl_factor * (edited.exp() * (edited - base)).sum()
        decay = sum(shift.norm() / start.norm() ** 2 for shift, start in zip(shifts, initial, strict=True))
        loss = factor * sum(losses) / len(losses) + kl_term + options.weight_decay * decay
        passes_hit += hit
        settled = options.settle_kl is not None and hit and kl_term <= options.settle_kl
        enough = options.mpes is not None and passes_hit >= options.mpes
        if loss < options.stop_loss or settled or enough or step == options.steps - 1:
            break
        factor = options.settle_nll if options.settle_kl is not None and hit else 1.0
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for shift, start in zip(shifts, initial, strict=True):
                limit = options.clamp_norm_factor * start.norm()
                if shift.norm() > limit:
                    shift.mul_(limit / shift.norm())
    return (initial[0] + shifts[0]).detach(), step + 1, loss.item()


def plain_update(
    lm: LM,
    requests: Sequence[EditRequest],
    layers: Sequence[int],
    targets: Tensor | Callable[[int], Tensor],
    contexts: Contexts,
    moments: dict[int, Tensor],
    weight: float,
) -> dict[str, Tensor]:
    """MEMIT's updates (d, m) by weight for `targets` (d, n): one row at a time, the whole model for every key, a dense
    solve in float64.

    targets: what should leave the last layer, or a function that tells what should leave a layer's projection, asked
    once those below are written. Each layer's update stays in the model until all are made, and is taken out again at
    the end.
    """

    @torch.no_grad()
    def seen_at(text: str, character: int, module: str, entering: bool) -> Tensor:
        row, seen = lm.head.encode([(text, None)])[0], []
        listen = on_input if entering else on_output
        with listen(lm.module(module), lambda states: seen.append(states[0, row.token_at(character)].double()), rows=1):
            lm.model(input_ids=torch.tensor([row.ids]), use_cache=False)
        return seen[0]

    updates, originals = {}, {}
    for number, layer in enumerate(layers):
        keys, missing = [], []
        own = not isinstance(targets, Tensor)
        place = lm.layout.mlp_out(layer) if own else lm.layout.block(layers[-1])
        aimed = targets if isinstance(targets, Tensor) else targets(layer)
        for request, target in zip(requests, aimed.double().T, strict=True):
            end = request.subject_span[1] - 1
            each = [
                seen_at(prefix + request.text, len(prefix) + end, lm.layout.mlp_out(layer), True)
                for prefix in contexts.texts
            ]
            keys.append(sum(share * key for share, key in zip(contexts.weights, each, strict=True)).numpy())
            missing.append((target - seen_at(request.text, end, place, False)).numpy())
        k, r = np.stack(keys, axis=1), np.stack(missing, axis=1) / (len(layers) - number)
        update = r @ np.linalg.solve(weight * moments[layer].numpy() + k @ k.T, k).T
        name = f"{lm.layout.mlp_out(layer)}.weight"
        parameter = lm.parameter(name)
        originals[name], updates[name] = parameter.clone(), torch.from_numpy(update)
        stored = updates[name].T if is_transposed(lm.module(lm.layout.mlp_out(layer))) else updates[name]
        parameter.data += stored.to(parameter)
    for name, original in originals.items():
        lm.parameter(name).data.copy_(original)
    return updates


@torch.no_grad()
def plain_successes(lm: LM, case: Case) -> list[tuple[str, bool, bool]]:
    """(kind, success, accuracy) of every probe with a target and a foil: one row at a time, logits of the whole
    text.
    """

    def answer(prompt: str, target: str) -> tuple[float, bool]:
        row = lm.head.encode([(prompt, target)])[0]
        scores = (
            lm.model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0].log_softmax(-1)[row.start - 1 : -1]
        )
        wanted = torch.tensor(row.target)
        return -float(scores[torch.arange(len(wanted)), wanted].mean()), bool((scores.argmax(-1) == wanted).all())

    found: list[tuple[str, bool, bool]] = []
    for probe in case.probes:
        if probe.target and probe.foil:
            (target, hit), (foil, _) = answer(probe.prompt, probe.target), answer(probe.prompt, probe.foil)
            found.append((probe.kind, target < foil, hit))
    return found
