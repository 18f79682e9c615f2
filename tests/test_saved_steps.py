"""Edits of a sequence on disk: their room is bounded, and from what is left the sequence goes on with the same bits,
whenever it was killed.
"""

from __future__ import annotations

import pytest
import torch
from embedded import Prepared, embedded_lm, packaged_editor, same_bits, snapshot, world

from edit_cli.editors.memory.side_memory import WisePatch
from edit_cli.edits import store as edit_store
from edit_cli.edits.edit import Factors, WeightDelta, WeightState
from edit_cli.errors import MissingError
from edit_cli.experiment.saved_steps import SavedSteps
from edit_cli.lm.model import LM

METHODS = {
    "ft": ("method.steps=3",),
    "replay": ("method.steps=3", "method.every=3", "method.epochs=1"),
    "ewc": ("method.steps=3", "method.remembered=2"),
    "ultraedit": (),
    "wise": ("method.steps=4", "method.context.per_start=1", "method.shard_every=3", "method.merge_every=6"),
}
COUNT = 8


class Killed(BaseException):
    pass


def walk(lm: LM, made: Prepared, directory, count: int, room: float | None = 0.03) -> SavedSteps:
    """The first `count` steps of a sequence, those that are saved already being taken up, as the command takes them."""
    editor = made.on(lm)
    steps = SavedSteps(directory, lm, editor, room)
    for number, case in enumerate(world("tune")[:count]):
        if steps.saved(number):
            edit, _ = steps.read(number)
        else:
            edit = editor.edit(case.requests)
            steps.save(number, edit, case.requests, {"name": "m", "made": {"step": number, "seconds": 0.1}})
        if edit is not None:
            lm.attach(edit)
            lm.merge_top_edits()
            steps.attached(number, {"name": "m"})
    return steps


def present(lm: LM) -> dict[str, torch.Tensor]:
    """All weights as they are, and what a side memory holds."""
    memory = WisePatch.present(lm, lm.layout.mlp_out(4))
    sides = {f"side {n}": side.shift.clone() for n, side in enumerate(memory.memories)} if memory else {}
    return snapshot(lm) | sides


# one that remembers, one beside the weights, one with neither; the others are the same code
FEW = {"ft", "ultraedit", "wise"}


@pytest.fixture(params=[pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in METHODS])
def made(request, tmp_path):
    overrides = METHODS[request.param]
    if request.param == "wise":
        overrides += ("method.layer=4",)
    return lambda: packaged_editor(tmp_path, request.param, *overrides)


def test_a_sequence_goes_on_from_the_sum_of_its_edits_with_the_same_bits(made, tmp_path):
    whole = embedded_lm()
    walk(whole, made(), tmp_path / "whole", COUNT, room=None)
    assert not list((tmp_path / "whole").glob("state-*"))
    for cut in (3, 5, 7):
        walk(embedded_lm(), made(), tmp_path / "cut", cut)
    resumed = embedded_lm()
    untouched = snapshot(resumed)
    steps = walk(resumed, made(), tmp_path / "cut", COUNT)
    assert steps.start >= 0
    assert same_bits(present(resumed), present(whole))
    while resumed.attached:
        resumed.detach()
    assert same_bits(snapshot(resumed), untouched)
    edit_store.attach(tmp_path / "cut", resumed)  # by hand, without a command
    assert same_bits(present(resumed), present(whole))


def test_the_room_of_dense_edits_is_bounded(tmp_path):
    lm, editor, kept = embedded_lm(), packaged_editor(tmp_path, "ft", "method.steps=1"), []
    for count in range(1, 13):
        walk(lm_of(tmp_path, editor, lm), editor, tmp_path / "run", count, room=2)
        kept.append(sum(file.stat().st_size for file in (tmp_path / "run").rglob("*.safetensors")))
    matrix = 4 * 128 * 512
    assert kept[0] == pytest.approx(matrix, rel=0.01)
    assert max(kept) < 3.1 * matrix
    assert len(list((tmp_path / "run").glob("0*/edit.json"))) == 12  # what was edited is known of every step


def lm_of(tmp_path, editor, lm: LM) -> LM:
    """The same model without edits: each call of `walk` takes the sequence up from disk."""
    while lm.attached:
        lm.detach()
    return lm


def test_what_is_remembered_beside_the_weights_stays(tmp_path):
    lm = embedded_lm()
    name = f"{lm.layout.mlp_out(0)}.weight"
    edit = WeightDelta(
        {name: Factors(torch.ones(128, 1), torch.ones(1, 512))}, {"facts": [["a", "b"]]}, {"keys.0": torch.arange(6.0)}
    )
    edit_store.save(edit, tmp_path / "00000", lm, [], {"name": "m"})
    edit_store.let_go(tmp_path / "00000", "state-00003")
    left = edit_store.remains(tmp_path / "00000", lm)
    assert isinstance(left, WeightDelta)
    assert (left.updates, left.info) == ({}, edit.info) and torch.equal(left.memory["keys.0"], torch.arange(6.0))
    assert not (tmp_path / "00000" / edit_store.TENSORS).exists()
    edit_store.let_go(tmp_path / "00000", "state-00009")  # again: nothing changes
    with pytest.raises(MissingError, match="no longer has its own weights: .*state-00003 holds what the model was"):
        edit_store.load(tmp_path / "00000", lm)


@pytest.mark.parametrize("at", [1, *(pytest.param(at, marks=pytest.mark.slow) for at in (2, 3, 6)), 4])
def test_being_killed_while_earlier_weights_are_let_go_costs_nothing(at, tmp_path, monkeypatch):
    def editor():
        return packaged_editor(tmp_path, "ft", "method.steps=2")

    whole = embedded_lm()
    walk(whole, editor(), tmp_path / "whole", 7, room=None)
    calls, unlink, write = [], type(tmp_path).unlink, edit_store.write_json

    def dying(act):
        def one_more(*args, **kwargs):
            calls.append(1)
            if len(calls) == at:
                raise Killed
            return act(*args, **kwargs)

        return one_more

    with monkeypatch.context() as patch, pytest.raises(Killed):
        let_go = SavedSteps._let_go

        def deadly(self, latest):
            patch.setattr(type(tmp_path), "unlink", dying(unlink))
            patch.setattr(edit_store, "write_json", dying(write))
            let_go(self, latest)
            patch.setattr(type(tmp_path), "unlink", unlink)
            patch.setattr(edit_store, "write_json", write)

        patch.setattr(SavedSteps, "_let_go", deadly)
        walk(embedded_lm(), editor(), tmp_path / "cut", 7)
    resumed = embedded_lm()
    walk(resumed, editor(), tmp_path / "cut", 7)
    assert same_bits(snapshot(resumed), snapshot(whole))
    for path in (tmp_path / "cut").glob("0*"):
        assert (path / edit_store.TENSORS).exists() == (edit_store.read_manifest(path).get("state_after") is None)


def test_sixteen_bit_models_keep_their_masters(tmp_path):
    lm = embedded_lm()
    lm.model.bfloat16()
    name = f"{lm.layout.mlp_out(0)}.weight"
    before = snapshot(lm)
    for seed in range(3):
        lm.attach(
            WeightDelta(
                {name: torch.randn(lm.access(name).shape, generator=torch.Generator().manual_seed(seed)) * 1e-3}
            )
        )
        lm.merge_top_edits()
    master, weight = lm.masters[name].clone(), lm.access(name).value().clone()
    state = WeightState.present(lm, [name])
    lm.detach()
    assert same_bits(snapshot(lm), before)
    with lm.edited(state):
        assert torch.equal(lm.masters[name], master) and torch.equal(lm.access(name).value(), weight)
    assert same_bits(snapshot(lm), before) and name not in lm.masters
