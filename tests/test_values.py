"""The batched value optimization against the plain one: one edit, one row, the whole model at every step."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from embedded import embedded_lm, world
from families import tiny_lm
from oracle import plain_value

from edit_cli.editors.locate.context_prefixes import ContextConfig, rows_in_contexts, sample_contexts
from edit_cli.editors.locate.value_batch import ValueConfig
from edit_cli.editors.locate.value_optimization import _Search, optimize_values
from edit_cli.errors import OutOfMemory, UsageError
from edit_cli.lm.fast.suffix_pass import SuffixForward, SuffixRow
from edit_cli.requests import EditRequest

pytestmark = pytest.mark.thin(6)

REQUESTS = [
    EditRequest("The mother tongue of {} is", "Anna Bo", "French"),
    EditRequest("{} is a", "Paris", "very big city"),
    EditRequest("So it was that {} and", "Tom of Tim", "You"),
    EditRequest("In the city of {}, people", "A", "speak"),
    EditRequest("{}'s home is", "Bo", "the road"),
]
PREFIXES = ContextConfig(prefixes=["The city", "I went to the road and so on", "You"])


SITES = [("block", 1), ("mlp_out", 0), ("mlp_out", 1)]


@pytest.mark.parametrize(
    ("family", "site", "layer"),
    [
        # each family at one site, each site in one family; the rest takes minutes
        pytest.param(family, *site, marks=() if family == "llama" or number % 3 == place else pytest.mark.slow)
        for number, family in enumerate(["gpt2", "llama", "gpt_neox", "bloom", "gemma2", "opt"])
        for place, site in enumerate(SITES)
    ],
)
def test_batched_values_equal_the_plain_ones(family, site, layer):
    lm = tiny_lm(family)
    requests = REQUESTS
    if family != "gemma2":  # which mixes dtypes in float64
        lm.model.double()  # a random model amplifies rounding, and the two paths differ in nothing else
    else:  # a gradient of 1e-11 is nothing but rounding in float32, and Adam divides by it
        requests = [request for request in REQUESTS if request.subject != "A"]
    contexts = sample_contexts(lm, PREFIXES)
    options = ValueConfig(steps=12, clamp_norm_factor=2.0, batch_tokens=60)
    found = optimize_values(lm, requests, layer, site, options, contexts)
    tolerance = 1e-6 if lm.dtype == torch.float64 else 1e-4
    for number, request in enumerate(requests):
        value, steps, loss = plain_value(lm, request, layer, site, options, contexts)
        assert float((found.target[:, number] - value).norm() / value.norm()) < tolerance
        assert (found.steps[number], found.losses[number]) == (steps, pytest.approx(loss, rel=tolerance))


def test_on_the_embedded_model_each_edit_stops_by_itself_where_the_plain_one_does():
    lm = embedded_lm()
    requests = [case.requests[0] for case in world()[:6]]
    contexts, options = sample_contexts(lm, ContextConfig()), ValueConfig(batch_tokens=60)
    found = optimize_values(lm, requests, 3, "block", options, contexts)
    assert len(set(found.steps)) > 2, "the edits should stop at different steps for this test to mean anything"
    for number, request in enumerate(requests):
        value, steps, loss = plain_value(lm, request, 3, "block", options, contexts)
        assert float((found.target[:, number] - value).norm() / value.norm()) < 1e-4
        assert (found.steps[number], found.losses[number]) == (steps, pytest.approx(loss, rel=1e-3))


def test_progress_counts_steps_and_ends_at_its_total(monkeypatch):
    """A batch of edits comes to its end at once: finished facts would stand at 0 until then."""
    lm = embedded_lm()
    counted: list[tuple[int, list[int]]] = []

    @contextmanager
    def task(description, total):
        counted.append((total, []))
        yield counted[-1][1].append

    monkeypatch.setattr(lm.monitor, "task", task)
    requests, options = [case.requests[0] for case in world()[:6]], ValueConfig(batch_tokens=60)
    found = optimize_values(lm, requests, 3, "block", options, sample_contexts(lm, ContextConfig()))
    assert len(set(found.steps)) > 2, "edits should stop early for this test to mean anything"
    total, steps = counted[-1]
    assert total == 6 * options.steps == sum(steps) and len(steps) > options.steps and min(steps) > 0


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_the_size_of_a_batch_changes_nothing(batch_tokens):
    lm = tiny_lm("llama")
    contexts = sample_contexts(lm, PREFIXES)
    expected = optimize_values(lm, REQUESTS, 1, "block", ValueConfig(steps=6), contexts)
    found = optimize_values(lm, REQUESTS, 1, "block", ValueConfig(steps=6, batch_tokens=batch_tokens), contexts)
    torch.testing.assert_close(found.target, expected.target, rtol=1e-4, atol=1e-5)


def test_shift_stays_within_its_clamp():
    lm = tiny_lm("gpt2")
    found = optimize_values(lm, REQUESTS, 1, "block", ValueConfig(clamp_norm_factor=0.3), sample_contexts(lm, PREFIXES))
    ratio = (found.target - found.initial).norm(dim=0) / found.initial.norm(dim=0)
    assert ratio.max() <= 0.3 * (1 + 1e-5)
    assert ratio.max() > 0.29


def test_running_out_of_memory_halves_the_batch_and_gives_the_same_values(monkeypatch):
    lm = tiny_lm("gpt2")
    contexts, options = sample_contexts(lm, PREFIXES), ValueConfig(steps=6, batch_tokens=10_000)
    expected = optimize_values(lm, REQUESTS, 1, "block", options, contexts)
    plain, calls = SuffixForward.logits, []

    def scarce(self, change, module=None):
        calls.append(len(self.ids))
        if len(self.ids) > 10:
            raise torch.OutOfMemoryError("no memory left")
        return plain(self, change, module)

    build = _Search._build

    def with_shortcuts(self, edits):
        self.shortcuts = True
        return build(self, edits)

    monkeypatch.setattr(_Search, "_build", with_shortcuts)
    monkeypatch.setattr(SuffixForward, "logits", scarce)
    found = optimize_values(lm, REQUESTS, 1, "block", options, contexts)
    assert calls[0] > 10 and max(calls[-6:]) <= 10
    assert found.steps == expected.steps
    torch.testing.assert_close(found.target, expected.target, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(
        SuffixForward, "logits", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("none at all"))
    )
    with pytest.raises(OutOfMemory, match="one edit alone"):
        optimize_values(lm, REQUESTS, 1, "block", options, contexts)


def test_a_model_that_takes_no_prefix_is_noticed_and_still_right(monkeypatch):
    lm = tiny_lm("gpt2")
    notes: list[str] = []
    monkeypatch.setattr(lm.monitor, "note", notes.append)
    contexts, options = sample_contexts(lm, PREFIXES), ValueConfig(steps=5)
    expected = optimize_values(lm, REQUESTS, 1, "block", options, contexts)
    monkeypatch.setattr(SuffixForward, "_cache", lambda self: (self.prefix[-1][0].zero_(), _plain_cache(self))[1])
    found = optimize_values(lm, REQUESTS, 1, "block", options, contexts)
    assert len(notes) == 1 and "cached prefix" in notes[0]
    torch.testing.assert_close(found.target, expected.target, rtol=1e-4, atol=1e-5)


_plain_cache = SuffixForward._cache


def test_rows_that_leave_and_join_keep_their_logits():
    lm = tiny_lm("gpt2")
    rows, lookup = rows_in_contexts(lm, REQUESTS, sample_contexts(lm, PREFIXES), with_target=True)
    suffixes = [SuffixRow(r.ids[:-1], at, (len(r.ids) - 2,)) for r, at in zip(rows, lookup, strict=True)]
    whole = SuffixForward(lm, suffixes, frozen=0)
    same = lambda states, *_: states  # noqa: E731
    assert whole.agrees(whole.logits(same))
    keep = torch.tensor([1, 4, 5, 12])
    few = whole.select(keep)
    torch.testing.assert_close(few.logits(same), whole.base[keep], rtol=1e-4, atol=1e-4)
    rest = SuffixForward(lm, [suffixes[0], suffixes[-1]], frozen=0)
    both = few.join(rest)
    torch.testing.assert_close(both.logits(same), torch.cat([few.base, rest.base]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("key", "value"), [("kl_position", "end"), ("kl_prompt", "is a")])
def test_options_are_checked(key, value):
    with pytest.raises(UsageError, match=f"method.value.{key}"):
        ValueConfig(**{key: value})
