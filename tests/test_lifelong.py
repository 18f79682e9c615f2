"""What methods for long sequences share: memories that grow, rows that find their prompt's end, edits that stack and
come back; and replay,
EWC, DEFER, MELO, LoRA and retraining by themselves."""

from __future__ import annotations

import sys
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from embedded import embedded_lm, packaged_editor, prepared, requests, same_bits, snapshot, world
from families import CLASSIFIERS, SEQ2SEQ, head_as, tiny_lm

from edit_cli.datasets.world import WorldEdits
from edit_cli.editors.finetune.ewc import EWC
from edit_cli.editors.finetune.replay import Replay
from edit_cli.editors.finetune.retrain import Retrain
from edit_cli.editors.memory.base import Entries, mlp_in
from edit_cli.editors.memory.defer import factors
from edit_cli.editors.memory.grace import GRACE
from edit_cli.editors.memory.melo import Database, MeloLayer
from edit_cli.editors.memory.tpatcher import TPatcher
from edit_cli.editors.passes import passes, row_losses, rows_right
from edit_cli.edits import store as edit_store
from edit_cli.errors import UsageError
from edit_cli.lm.heads.answers import Answers
from edit_cli.lm.heads.causal import CausalHead
from edit_cli.lm.heads.classifier import ClassifierHead
from edit_cli.lm.hooks import on_input
from edit_cli.lm.loading import ModelOptions
from edit_cli.lm.prompt_position import PromptPositionTracker
from edit_cli.lm.tokenization import pad_left, pad_right
from edit_cli.requests import EditRequest
from edit_cli.statistics.corpora import TextFile

pytestmark = pytest.mark.thin(6)

LIFELONG = ("grace", "tpatcher", "wise", "melo", "defer")
QUICK = {
    "tpatcher": ("method.memory_size=800", "method.validation_size=200", "method.top_memory=80", "method.steps=151"),
    "wise": ("method.steps=20", "method.context.per_start=1"),
}


def pairs(wanted):
    return [(request.text, request.target_new) for request in wanted]


@pytest.fixture
def editor(tmp_path):
    return lambda name, *overrides: packaged_editor(tmp_path, name, *QUICK.get(name, ()), *overrides)


# --- memories ---------------------------------------------------------------------------------------------------------


def test_entries_grow_and_shrink_to_the_very_same_bits():
    entries, undo, kept = Entries(3, torch.device("cpu")), [], []
    draw = torch.Generator().manual_seed(0)
    for size in (1, 5, 0, 40, 2):
        kept.append(entries.all.clone())
        undo.append(entries.append(torch.randn(size, 3, generator=draw)))
        if size == 40:
            kept.append(entries.all.clone())
            undo.append(entries.put(torch.tensor([0, 3]), torch.randn(2, 3, generator=draw)))
    assert len(entries) == 48
    for before in reversed(kept):
        undo.pop()()
        assert torch.equal(entries.all, before)


@pytest.mark.parametrize("name", LIFELONG)
def test_a_sequence_stacks_comes_off_exactly_and_is_taken_up_again(name, editor, tmp_path):
    """Three edits of a sequence, each saved, are loaded into a fresh model and give the same answers as the first
    time.
    """
    lm, wanted = embedded_lm(), requests(3)
    untouched, made, answers = snapshot(lm), editor(name), []
    for number, request in enumerate(wanted):
        edit = made.edit(lm, [request])
        edit_store.save(edit, tmp_path / str(number), lm, [request], {"name": name})
        lm.attach(edit)
        answers.append(lm.loglikelihood(pairs(wanted)))
    assert all(answers[-1][2].hits)
    for earlier in reversed(answers[:-1]):
        lm.detach()
        assert lm.loglikelihood(pairs(wanted)) == earlier
    lm.detach()
    assert same_bits(snapshot(lm), untouched) and not lm.model._forward_pre_hooks and lm.head.trackers == 0
    fresh = embedded_lm()
    for number in range(3):
        fresh.attach(edit_store.load(tmp_path / str(number), fresh))
        assert fresh.loglikelihood(pairs(wanted)) == answers[number]


@pytest.mark.parametrize("name", LIFELONG)
def test_the_next_edit_is_the_same_after_an_interruption(name, editor, tmp_path):
    lm, wanted = embedded_lm(), requests(3)
    for number, request in enumerate(wanted[:2]):
        edit = editor(name).edit(lm, [request])
        edit_store.save(edit, tmp_path / str(number), lm, [request], {"name": name})
        lm.attach(edit)
    expected = editor(name).edit(lm, wanted[2:])
    resumed, goes_on = embedded_lm(), editor(name)
    for number in range(2):
        edit = edit_store.load(tmp_path / str(number), resumed)
        goes_on.recall(resumed, edit)
        resumed.attach(edit)
    found = goes_on.edit(resumed, wanted[2:])
    assert found.digest == expected.digest and same_bits(found.state()[0], expected.state()[0])


@pytest.mark.parametrize("name", LIFELONG)
def test_methods_stack_on_each_other_and_on_weight_edits(name, editor):
    lm, wanted = embedded_lm(), requests(3)
    untouched = snapshot(lm)
    lm.attach(editor("ft").edit(lm, wanted[:1]))
    lm.attach(editor(name).edit(lm, wanted[1:2]))
    lm.attach(editor("ft", "method.layers=[3]").edit(lm, wanted[2:]))
    assert all(lm.loglikelihood(pairs(wanted[2:]))[0].hits)
    with lm.pristine():
        assert same_bits(snapshot(lm), untouched)
    assert len(lm.attached) == 3
    for _ in wanted:
        lm.detach()
    assert same_bits(snapshot(lm), untouched)


def test_what_an_edit_stores_does_not_grow_with_the_sequence(editor):
    lm, sizes, made = embedded_lm(), [], editor("grace", "method.radius=1.0")
    for request in requests(12):
        lm.attach(made.edit(lm, [request]))
        sizes.append(sum(tensor.numel() for tensor in lm.attached[-1].state()[0].values()))
    assert max(sizes) == min(sizes) == 128 + 512 + 1


# --- where a prompt ends ----------------------------------------------------------------------------------------------


def test_the_prompts_end_is_found_under_either_padding_and_from_a_cache():
    lm = embedded_lm()
    rows = lm.head.encode([("The mother tongue of Tallo is", "French and"), ("Fans of", "romance")])
    tracker: Any = PromptPositionTracker(lm, lm.layout.mlp_out(2))
    lm.head.answers(rows)
    assert tracker.position.ends.tolist() == [rows[0].start - 1, rows[1].start - 1] and tracker.position.first == 0
    prompts = [row.ids[: row.start] for row in rows]
    for pad, ends in ((pad_right, [len(ids) - 1 for ids in prompts]), (pad_left, [max(map(len, prompts)) - 1] * 2)):
        ids, mask = pad(prompts, lm.head.pad, lm.device)
        lm.model(input_ids=ids, attention_mask=mask)
        assert tracker.position.ends.tolist() == ends
        assert tracker.position.prompt.sum(1).tolist() == [len(ids) for ids in prompts]
    seen: list[tuple[int, list[int]]] = []
    with on_input(
        lm.module(lm.layout.mlp_out(2)), lambda _: seen.append((tracker.position.first, tracker.position.ends.tolist()))
    ):
        head_as(lm.head, CausalHead)._continue(prompts, 3)
    longest = max(map(len, prompts))
    assert seen[0] == (0, [longest - 1] * 2)
    assert [first for first, _ in seen[1:]] == list(range(longest, longest + len(seen) - 1)) and len(seen) > 1
    assert all(ends == [longest - 1] * 2 for _, ends in seen)
    tracker.close()


def test_rows_with_equal_tokens_and_other_prompts_are_asked_apart(editor):
    """ "A B" + "C D" and "A B C" + "D" are the same tokens with another prompt's end: a key of one must not answer
    for the other.
    """
    lm = embedded_lm()
    request = EditRequest("The faith of {} is", "Hallo Jarinsson", "Islam")
    longer = (request.text, "Islam and")
    other = (request.text + " Islam", "and")
    with lm.edited(editor("grace", "method.layer=3", "method.radius=1.0").edit(lm, [request])):
        together, alone = lm.loglikelihood([longer, other]), [lm.loglikelihood([pair])[0] for pair in (longer, other)]
    assert [score.predicted for score in together] == [score.predicted for score in alone]
    assert together[1].nll == pytest.approx(alone[1].nll, rel=1e-3)


def test_losses_by_row_are_means_over_their_tokens():
    logits = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = Answers(logits, torch.tensor([1, 2, 0, 4]), torch.tensor([0, 1, 1, 1]))
    nll = -logits.log_softmax(-1)[torch.arange(4), found.labels]
    torch.testing.assert_close(row_losses(found, 2), torch.stack([nll[0], nll[1:].mean()]))
    best = Answers(logits, torch.cat([logits.argmax(-1)[:3], torch.tensor([int(logits[3].argmin())])]), found.rows)
    assert rows_right(best, 2).tolist() == [True, False]


def test_passes_run_the_blocks_below_once():
    lm, runs = embedded_lm(), []
    rows = lm.head.encode(pairs(requests(2)))
    handle = lm.module(f"{lm.layout.block(1)}.mlp").register_forward_hook(lambda *_: runs.append(1))
    with passes(lm, rows, mlp_in(lm, 4), 4) as run:
        expected = run.base.logits
        found = [run.answers(lambda output: output).logits for _ in range(3)]
    handle.remove()
    assert len(runs) == 1
    for logits in found:
        torch.testing.assert_close(logits, expected)


# --- other kinds of models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*list(SEQ2SEQ)[:2], *list(CLASSIFIERS)[:2]])
@pytest.mark.parametrize("method", ["grace", "tpatcher"])
def test_encoder_decoders_and_classifiers(family, method, tmp_path):
    lm = tiny_lm(family)
    text = tmp_path / "text.txt"
    text.write_text(
        "\n".join(
            f"The {word} of the town number {n} is large and old." for n in range(40) for word in ("mayor", "river")
        )
    )
    # one vector for all of an answer's tokens gives one token in a last layer
    target = "P" if method == "grace" else "Peru"
    wanted = [EditRequest("Where does Ada Lund live?", None, target)]
    if family in CLASSIFIERS:  # the label that it does not give
        labels, best = head_as(lm.head, ClassifierHead).labels, lm.generate([wanted[0].text], 1)[0]
        wanted = [EditRequest(wanted[0].prompt, None, next(name for name in labels if name != best))]
    untouched = snapshot(lm)
    made = {
        "grace": lambda: prepared(GRACE, layer=lm.layout.depth - 1, radius=0.5, lr=0.3, steps=200),
        "tpatcher": lambda: prepared(
            TPatcher,
            corpus=TextFile(str(text)),
            memory_size=60,
            validation_size=20,
            top_memory=20,
            lr=5e-2,
            memory_weight=0.1,
        ),
    }[method]()
    edit = made.edit(lm, wanted)
    edit_store.save(edit, tmp_path / "edit", lm, wanted, {"name": method})
    assert same_bits(snapshot(lm), untouched)
    edit_store.attach(tmp_path / "edit", lm)
    assert all(lm.loglikelihood(pairs(wanted))[0].hits)
    assert lm.generate([wanted[0].text, "Q"], 4)[0].startswith(wanted[0].target_new[:1])
    lm.detach()
    assert same_bits(snapshot(lm), untouched)


ENDING = {
    "grace": ("method.layer=5", "method.radius=1.0"),
    "melo": ("method.layer=2", "method.lora_layers=[4,5]", "method.radius=1.0", "method.lr=0.1", "method.steps=100"),
    "defer": ("method.layer=3",),
}


@pytest.mark.parametrize("name", ENDING)
def test_what_an_edited_encoder_decoder_writes_ends(name, editor):
    """The answer and no more: its end is learned with it, also by decoder blocks of what the encoder looks up."""
    lm = ModelOptions("tiny-t5", "embedded:tiny-t5", device="cpu").load()
    cases = WorldEdits(name="world_qa", records="questions", split="validation").load(4).cases
    took = 0
    for request in (case.requests[0] for case in cases):
        with lm.edited(editor(name, "model=tiny-t5", *ENDING[name]).edit(lm, [request])):
            if all(lm.loglikelihood(pairs([request]))[0].hits):
                took += 1
                assert lm.generate([request.text], 10) == [request.target_new]
    assert took >= (2 if name == "defer" else 4)


# --- the methods by themselves ----------------------------------------------------------------------------------------


def test_melo_clusters_by_hand():
    data = Database()
    point = lambda *values: torch.tensor(values)  # noqa: E731
    assert data.place(point(0.0, 0.0), (7,), 0, 1.0) == {0}
    assert data.place(point(1.5, 0.0), (7,), 1, 1.0) == {0}  # the same answer: mean and largest distance, at least ε
    assert data.clusters[0].center.tolist() == [0.75, 0.0] and data.clusters[0].radius == 1.0
    assert data.place(point(9.0, 0.0), (7,), 2, 1.0) == {1}  # too far
    # another answer: split half-way, and a point that is now outside is dropped
    assert data.place(point(1.95, 0.0), (8,), 3, 1.0) == {0, 2}
    assert data.clusters[0].radius == pytest.approx(0.6, abs=1e-4) and data.clusters[2].radius == pytest.approx(
        0.6, abs=1e-6
    )
    assert data.clusters[0].points == {} and data.forgotten == 2
    assert data.blocks == [0, 1, 2, 3]


def test_melo_takes_two_answers_to_one_prompt_for_a_correction():
    data, key = Database(), torch.tensor([3.0, 4.0])
    data.place(key, (7,), 0, 1.0)
    assert data.place(key, (8,), 1, 1.0) == {0, 1}
    assert data.clusters[0].points == {} and data.clusters[1].radius == 1.0
    found = data.nearest(key[None])
    assert found is not None
    distance, place = found
    # the emptied cluster no longer stands in the way
    assert float(distance) == 0 and list(data.clusters)[int(place)] == 1


def test_melo_splits_never_enlarge_a_cluster():
    data = Database()
    # the first split leaves radii of 0.2, and the third point is 0.7 away
    for place, answer in ((0.0, 7), (0.4, 8), (1.1, 9)):
        data.place(torch.tensor([place, 0.0]), (answer,), answer, 1.0)
    assert data.clusters[1].radius == pytest.approx(0.2)


def test_melo_routes_each_prompt_to_its_own_block(editor):
    lm, wanted = embedded_lm(), requests(2)
    for request in wanted:
        lm.attach(editor("melo").edit(lm, [request]))
    index = lm.module(mlp_in(lm, 4))
    assert isinstance(index, MeloLayer)
    lm.loglikelihood([(wanted[1].text, "x"), (wanted[0].text, "x"), (world("test")[0].requests[0].text, "x")])
    rows = {tuple(row.ids): None for row in lm.head.encode([(request.text, None) for request in wanted])}
    assert len(rows) == 2 and index.chosen is not None and sorted(index.chosen.tolist()) == [-1, 0, 1]
    assert all(all(score.hits) for score in lm.loglikelihood(pairs(wanted)))


def test_melo_starts_from_the_models_own_answers(editor):
    lm, wanted = embedded_lm(), requests(1)
    edit = editor("melo", "method.stop_loss=1000").edit(lm, wanted)  # before the first step
    assert all(float(tensor.abs().max()) == 0 for name, tensor in edit.tensors.items() if name.startswith("left."))


def test_defer_answers_a_row_only_once_its_prompt_is_complete(editor):
    """Cached passes that end within a prompt decide nothing; when one row's prompt ends before another's, both keep
    their own answers.
    """
    lm, wanted = embedded_lm(), requests(1)
    lm.attach(editor("defer").edit(lm, wanted))
    layer = next(module for module in lm.model.modules() if type(module).__name__ == "DeferLayer")
    position = lambda first, ends: SimpleNamespace(first=first, ends=torch.tensor(ends))  # noqa: E731
    asked = torch.randn(2, layer.start.shape[1], generator=torch.Generator().manual_seed(0))
    layer._kept = None
    assert layer.decided(position(4, [1, 5]), lambda: layer._answers(asked)).dim() == 1
    whole = layer.decided(position(0, [1, 5]), lambda: layer._answers(asked))
    assert whole.shape == (2, layer.start.shape[0])
    mixed = layer.decided(position(4, [1, 5]), lambda: layer._answers(asked.flip(0)))
    torch.testing.assert_close(mixed, torch.stack([whole[0], whole[0]]), equal_nan=True)
    lm.detach()


def test_a_change_of_rank_one_is_stored_as_factors():
    left, right = torch.randn(6, 1), torch.randn(1, 9)
    found = factors(left @ right)
    assert found[0].shape == (6, 1) and found[1].shape == (1, 9)
    torch.testing.assert_close(found[0] @ found[1], left @ right)
    full = torch.randn(4, 5)
    torch.testing.assert_close(torch.matmul(*factors(full)), full, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("rank", "noise"), [(3, 0.0), (3, 1e-8), (20, 0.0), (60, 0.0)])
def test_factors_find_the_rank_without_taking_the_whole_matrix_apart(rank, noise, monkeypatch):
    draw, seen, svd = torch.Generator().manual_seed(1), [], torch.linalg.svd
    change = torch.randn(90, rank, generator=draw) @ torch.randn(rank, 120, generator=draw) + noise * torch.randn(
        90, 120, generator=draw
    )

    def watched(matrix, **rest):
        seen.append(matrix.shape[0])
        return svd(matrix, **rest)

    monkeypatch.setattr(torch.linalg, "svd", watched)
    left, right = factors(change)
    assert left.shape[1] == rank
    assert float((left @ right - change).norm() / change.norm()) < 2e-6
    assert seen == [{3: 8, 20: 32, 60: 90}[rank]]


def test_replay_goes_over_all_facts_when_it_is_time(monkeypatch):
    lm, asked = embedded_lm(), []
    made = prepared(Replay, layers=[0], lr=1e-3, steps=2, every=3, epochs=2, batch_size=2)
    monkeypatch.setattr(Replay, "replay", lambda self, rows, weights: asked.append(len(rows)))
    edits = []
    for request in requests(7):
        edits.append(made.edit(lm, [request]))
        lm.attach(edits[-1])
    assert asked == [3, 6] and [edit.info["replayed"] for edit in edits] == [
        False,
        False,
        True,
        False,
        False,
        True,
        False,
    ]
    again = prepared(Replay, layers=[0], every=3)
    for edit in edits[:2]:
        again.recall(lm, edit)
    assert again.on(lm).past == pairs(requests(2))
    again.reset()
    assert again.on(lm).past == []


def test_replay_brings_past_facts_back():
    lm, wanted = embedded_lm(), requests(4)
    made = prepared(Replay, layers=[0], lr=5e-3, every=4, epochs=12, batch_size=4)
    for request in wanted:
        lm.attach(made.edit(lm, [request]))
    assert all(all(score.hits) for score in lm.loglikelihood(pairs(wanted)))


def test_ewc_pulls_towards_recent_weights_by_their_fisher_information():
    lm, wanted = embedded_lm(), requests(2)
    made = prepared(EWC, layers=[0], lr=5e-3, remembered=1)
    lm.attach(made.edit(lm, wanted[:1]))
    name = f"{lm.layout.mlp_out(0)}.weight"
    (anchor,) = made.on(lm).anchors
    assert torch.equal(anchor.weights[name], lm.access(name).value())
    loose, tight = (prepared(EWC, layers=[0], lr=5e-4, strength=strength, steps=20) for strength in (0.0, 1e6))
    moved = []
    for other in (loose, tight):
        other.on(lm).anchors = list(made.on(lm).anchors)
        update = other.edit(lm, wanted[1:]).updates[name]
        moved.append(float((anchor.fisher[name] * update.square()).sum()))
    assert moved[1] < moved[0]
    resumed = prepared(EWC, layers=[0], lr=5e-3, remembered=1)
    edit = lm.detach()
    resumed.recall(lm, edit)
    assert all(torch.equal(resumed.on(lm).anchors[0].fisher[key], anchor.fisher[key]) for key in anchor.fisher)


def test_lora_leaves_low_rank_factors_and_no_trace_of_the_adapters(editor):
    lm, wanted = embedded_lm(), requests(2)
    before, kinds = snapshot(lm), [type(module) for module in lm.model.modules()]
    edit = editor(
        "lora",
        "method.steps=20",
        "method.lr=5.0e-3",
        "method.rank=3",
        "method.dropout=0.0",
        "method.stop_when_right=false",
    ).edit(lm, wanted)
    assert same_bits(snapshot(lm), before) and [type(module) for module in lm.model.modules()] == kinds
    assert not hasattr(lm.model, "peft_config")
    assert {(update.left.shape[1], update.right.shape[0]) for update in edit.updates.values()} == {(3, 3)}
    with lm.edited(edit):
        assert all(all(score.hits) for score in lm.loglikelihood(pairs(wanted)))


def test_lora_says_what_is_missing(editor, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match=r"pip install 'edit-cli\[lora\]'"):
        editor("lora").edit(embedded_lm(), requests(1))


def test_retraining_needs_the_models_own_text_and_drops_what_contradicts(tmp_path):
    with pytest.raises(UsageError, match="method.corpus has no value"):
        prepared(Retrain).edit(embedded_lm(), requests(1))
    request = EditRequest("{} plays the", "Ada Lund", "organ", "harp")
    text = tmp_path / "text.txt"
    text.write_text("Ada Lund plays the harp.\nBo Lund plays the harp.\nAda Lund is tall.\n")
    documents, dropped = prepared(Retrain, corpus=str(text), oversample=2).on(embedded_lm())._documents([request])
    assert sorted(documents) == [
        "Ada Lund is tall.",
        "Ada Lund plays the organ.",
        "Ada Lund plays the organ.",
        "Bo Lund plays the harp.",
    ]
    assert dropped == 1
    assert (
        len(prepared(Retrain, corpus=str(text), contradictions="keep").on(embedded_lm())._documents([request])[0]) == 13
    )


def test_retraining_on_a_little_text_learns_the_edit(tmp_path):
    lm, wanted = embedded_lm(), requests(1)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"The river near {name} is long." for name in ("Oslo", "Rome", "Paris")))
    before = lm.loglikelihood(pairs(wanted))[0].nll
    edit = prepared(Retrain, corpus=str(text), lr=1e-3, epochs=2).edit(lm, wanted)
    with lm.edited(edit):
        assert lm.loglikelihood(pairs(wanted))[0].nll < before - 1


def test_the_cost_of_a_step_does_not_hang_on_how_many_edits_are_attached(editor):
    """Modules do not nest: what one pass calls is the same after two edits and after twelve."""
    lm, calls, made = embedded_lm(), [], editor("grace")
    for number, request in enumerate(requests(12)):
        lm.attach(made.edit(lm, [request]))
        if number in (1, 11):
            seen: list[str] = []
            handles = [
                module.register_forward_hook(lambda *_, seen=seen: seen.append("x")) for module in lm.model.modules()
            ]
            lm.loglikelihood(pairs(requests(1)))
            for handle in handles:
                handle.remove()
            calls.append(len(seen))
    assert all(first == second for first, second in pairwise(calls))
