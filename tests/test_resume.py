"""Shared beginnings and spared tokens: what is left out must not be missed."""

from __future__ import annotations

import pytest
import torch
from families import DENSE, tiny_lm
from torch import Tensor

from edit_cli.lm.fast.prefix_cache import common_lengths
from edit_cli.lm.fast.suffix_pass import SuffixForward, SuffixRow
from edit_cli.lm.fast.token_pruning import pruned_to, token_modules
from edit_cli.lm.hooks import on_input, on_output

TEXTS = [
    "The city of Anna Bo is",
    "The city of Anna Bo lies by the sea",
    "The city of Tom",
    "I went to the road and so on",
    "I went to Paris",
]
WITHOUT_CACHE = {"lfm2", "qwen3_5_text"}  # they mix tokens by other means than attention in some blocks


def suffixes(lm) -> list[SuffixRow]:
    rows = [row.ids for row in lm.head.encode([(text, None) for text in TEXTS])]
    return [SuffixRow(ids, len(ids) - 1 - number % 3, (len(ids) - 1,)) for number, ids in enumerate(rows)]


def test_rows_share_what_most_of_their_tokens_are_saved_by():
    first, second = (1, 2, 3, 4), (7, 8)
    rows = [(*first, 5), (*first, 6), (*first, 5, 9), (*second, 1), (*second, 2), (3,)]
    assert common_lengths(rows, [len(ids) - 1 for ids in rows]) == [4, 4, 4, 2, 2, 0]
    assert common_lengths([(1, 2, 3), (4, 5, 6)], [2, 2]) == [0, 0]
    assert common_lengths([(1, *range(10, 40)), (1, *range(50, 80))], [20, 20]) == [
        0,
        0,
    ], "one token of sixty is not worth a pass"


@pytest.mark.thin(3)
@pytest.mark.parametrize("family", sorted(DENSE))
def test_every_family_resumes_from_shared_beginnings_with_spared_tokens(family):
    lm = tiny_lm(family)
    assert lm.takes_shortcuts == (family not in WITHOUT_CACHE)
    whole = SuffixForward(lm, suffixes(lm), frozen=0, reuse_prefix=False)
    pruned = SuffixForward(lm, suffixes(lm), frozen=0, prune_from=1)
    torch.testing.assert_close(pruned.base, whole.base, rtol=1e-3, atol=1e-3)
    shift = 0.3 * torch.randn(len(TEXTS), lm.layout.width, generator=torch.Generator().manual_seed(0))

    def gradient(passes: SuffixForward) -> tuple[torch.Tensor, torch.Tensor]:
        moved = shift.clone().requires_grad_()

        def change(states, rows, columns):
            states = states.clone()
            states[rows, columns] += moved
            return states

        logits = passes.logits(change)
        return logits.detach(), torch.autograd.grad(logits.log_softmax(-1)[:, 5].sum(), moved)[0]

    for found, expected in zip(gradient(pruned), gradient(whole), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=2e-3)
    assert gradient(whole)[1].norm() > 1e-6


def test_less_is_run():
    lm = tiny_lm("gpt2")
    assert lm.takes_shortcuts
    counts = {}
    for name, prune_from in (("plain", None), ("pruned", 1)):
        seen: list[int] = []

        def count(states: Tensor, seen: list[int] = seen) -> None:
            seen.append(states.shape[:-1].numel())

        with on_input(lm.module(f"{lm.layout.block(2)}.mlp.c_fc"), count):
            passes = SuffixForward(lm, suffixes(lm), 0, prune_from=prune_from)
            seen.clear()
            passes.logits(lambda states, *_: states)
        counts[name] = sum(seen)
    assert counts["pruned"] == len(TEXTS) < counts["plain"]


def test_a_model_whose_mlp_looks_at_other_tokens_takes_no_shortcuts():
    lm = tiny_lm("gpt2")
    mlp = lm.model.transformer.h[1].mlp
    plain = mlp.forward
    mlp.forward = lambda states: plain(states) + states.cumsum(1)
    assert not lm.takes_shortcuts
    pruned = SuffixForward(lm, suffixes(lm), 0, prune_from=1)
    assert pruned.prune_from is None


@pytest.mark.parametrize("family", ["gpt2", "opt", "bloom", "llama"])
def test_spared_tokens_leave_a_module_as_zeros(family):
    lm = tiny_lm(family)
    ids = torch.arange(10, 22).view(3, 4)
    module, seen = token_modules(lm, 1)[0], []
    for chosen in (torch.arange(12), torch.tensor([1, 6, 11])):
        keep = lambda states: seen.append(states.reshape(-1, states.shape[-1]))  # noqa: E731
        with torch.no_grad(), pruned_to(module, chosen, 12), on_output(module, keep, rows=3):
            lm.model(input_ids=ids, use_cache=False)
    everything, few = seen
    torch.testing.assert_close(few[[1, 6, 11]], everything[[1, 6, 11]])
    assert not few[[0, 2, 3, 4, 5, 7, 8, 9, 10]].any() and everything.any(dim=1).all()
