"""16-bit models: statistics, values and solves have more digits than the model, edited matrices add up in float32,
and undo is exact.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Killed, exact
from embedded import METHODS, embedded_lm, packaged_editor, requests, same_bits, snapshot
from torch import Tensor
from torch.overrides import TorchFunctionMode

from edit_cli.editors.locate.base import Subjects
from edit_cli.editors.locate.value_optimization import optimize_values
from edit_cli.edits import store as edit_store
from edit_cli.edits.edit import Factors, WeightDelta
from edit_cli.files.json_files import read_json
from edit_cli.lm.hooks import on_input
from edit_cli.lm.loading import ModelOptions
from edit_cli.lm.model import LM
from edit_cli.requests import EditRequest

pytestmark = pytest.mark.thin(4)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
dtypes = pytest.mark.parametrize("dtype", DTYPES)
STEPS = 50
SLOW = ("blue", "emmet", "memit-merge", "pmet", "r-rome", "rome")  # optimize values as `memit` does


def load(dtype: Any) -> LM:
    return ModelOptions("tiny-gpt2", "embedded:tiny-gpt2", dtype=dtype, device="cpu").load()


def losses(lm: LM, wanted: list[EditRequest]) -> list[float]:
    return [score.nll for score in lm.loglikelihood([(request.text, request.target_new) for request in wanted])]


def same_state(first: LM, second: LM) -> bool:
    return same_bits(snapshot(first), snapshot(second)) and same_bits(first.masters, second.masters)


def small_updates(lm: LM, name: str) -> list[WeightDelta]:
    """Rank-one updates that lean the same way, each much smaller than what the weights' last digit is worth."""
    draw = torch.Generator().manual_seed(0)
    rows, columns = lm.weight(name).shape
    left, right = (torch.rand(STEPS, size, generator=draw) * 2.0**-6 for size in (rows, columns))
    return [WeightDelta({f"{name}.weight": Factors(a[:, None], b[None])}) for a, b in zip(left, right, strict=True)]


# --- sequences
# --------------------------------------------------------------------------------------------------------------


@dtypes
def test_fifty_small_updates_are_not_lost(dtype):
    """Beside the same in float32; rounded one by one, most of them would be gone."""
    lm, exact = load(dtype), load("float32")
    name = lm.layout.mlp_out(1)
    untouched, start, reference = snapshot(lm), lm.weight(name).clone(), exact.weight(name).clone()
    naive = start.clone()
    for edit in small_updates(lm, name):
        update = edit.updates[f"{name}.weight"]
        assert isinstance(update, Factors)
        naive += update.dense().to(naive)
        lm.attach(edit)
        exact.attach(edit)
    moved, expected = lm.weight(name).float() - start.float(), exact.weight(name) - reference
    assert expected.mean() > 1e-3
    assert moved.mean() == pytest.approx(expected.mean().item(), rel=0.01)
    digit = torch.finfo(DTYPES[dtype]).eps * lm.weight(name).float().abs().clamp_min(1e-3)
    assert ((moved - expected).abs() <= digit).all()
    if dtype == "bfloat16":
        assert (naive.float() - start.float() - expected).norm() > 3 * (moved - expected).norm()
    for _ in range(STEPS):
        lm.detach()
    assert same_bits(snapshot(lm), untouched)
    assert lm.masters == {}


@dtypes
def test_fifty_saved_updates_attached_again_are_the_same_bits(dtype, tmp_path):
    lm = load(dtype)
    name = lm.layout.mlp_out(1)
    for number, edit in enumerate(small_updates(lm, name)):
        edit_store.save(edit, tmp_path / f"{number:02d}", lm, [], {"name": "small"})
        lm.attach(edit)
    again = load(dtype)
    for number in range(STEPS):
        again.attach(edit_store.load(tmp_path / f"{number:02d}", again))
    assert again.masters[f"{name}.weight"].dtype == torch.float32
    assert same_state(again, lm)


@pytest.mark.parametrize(
    "method, dtype",
    [
        ("ft", "float16"),
        *(
            pytest.param(name, dtype, marks=pytest.mark.slow)
            for name, dtype in [
                *((name, "bfloat16") for name in ("memit", "alphaedit", "rome", "ft", "ultraedit")),
                ("memit", "float16"),
            ]
        ),
    ],
)
def test_a_resumed_sequence_is_the_unbroken_one(method, dtype, statistics, tmp_path):
    """Four steps, and the same after the second on a model that was loaded anew: edits, weights and masters have the
    same bits.
    """
    size = 2 if method == "ultraedit" else 1
    batches = [requests(4 * size)[first : first + size] for first in range(0, 4 * size, size)]
    lm, editor = load(dtype), packaged_editor(statistics, method)
    made = []
    for number, batch in enumerate(batches):
        made.append(editor.edit(lm, batch))
        edit_store.save(made[-1], tmp_path / str(number), lm, batch, {"name": method})
        lm.attach(made[-1])
    resumed, fresh = load(dtype), packaged_editor(statistics, method)
    for number in range(2):
        edit = edit_store.load(tmp_path / str(number), resumed)
        fresh.recall(resumed, edit)
        resumed.attach(edit)
    for batch, expected in zip(batches[2:], made[2:], strict=True):
        edit = fresh.edit(resumed, batch)
        assert same_bits(edit.state()[0], expected.state()[0])
        resumed.attach(edit)
    assert same_state(resumed, lm)
    assert lm.masters
    for _ in batches:
        resumed.detach()
    assert same_state(resumed, load(dtype))


@pytest.mark.slow
def test_a_killed_sequence_of_the_command_goes_on_in_the_same_bits(cli, kill_after):
    command = ("sequential", "method=memit", "limit=3", "protocol.batch_size=1", "model.dtype=bfloat16")
    assert cli(*command, "run_dir=whole", quick=True).code == 0
    kill_after(2)
    with pytest.raises(Killed):
        cli(*command, "run_dir=cut", quick=True)
    assert cli(*command, "run_dir=cut", quick=True).code == 0
    assert exact(Path("cut")) == exact(Path("whole"))
    ids = [[read_json(path)["id"] for path in sorted(Path(run).glob("edits/*/edit.json"))] for run in ("whole", "cut")]
    assert ids[0] == ids[1]
    assert len(ids[0]) == 3
    assert cli("apply", "cut", "--out", "baked").code == 0
    lm = load("bfloat16")
    for path in sorted(Path("cut/edits").iterdir()):
        lm.attach(edit_store.load(path, lm))
    assert same_bits(snapshot(ModelOptions("baked", "baked", dtype="bfloat16").load()), snapshot(lm))


# --- methods
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, dtype",
    [
        *(pytest.param(name, "bfloat16", marks=pytest.mark.slow if name in SLOW else ()) for name in METHODS),
        *(pytest.param(name, "float16", marks=() if name == "ft" else pytest.mark.slow) for name in METHODS),
    ],
)
def test_every_method_edits_and_leaves_no_trace(name, dtype, statistics):
    lm, wanted = load(dtype), requests(2)
    before, untouched = losses(lm, wanted), snapshot(lm)
    edit = packaged_editor(statistics, name).edit(lm, wanted)
    assert same_bits(snapshot(lm), untouched)
    assert all(tensor.dtype in (torch.float32, torch.float64, torch.int64) for tensor in edit.state()[0].values())
    with lm.edited(edit):
        assert all(new < old for new, old in zip(losses(lm, wanted), before, strict=True))
    assert (losses(lm, wanted), lm.masters) == (before, {})
    assert same_bits(snapshot(lm), untouched)


class LinearAlgebra(TorchFunctionMode):
    """Notes the dtypes that decompositions and solves work on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[torch.dtype]] = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name.startswith(("linalg_", "cholesky")) and "norm" not in name:
            self.seen.setdefault(name, set()).update(part.dtype for part in args if isinstance(part, Tensor))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "name, more",
    [
        ("memit", ()),
        ("ultraedit", ()),
        *(pytest.param(name, (), marks=pytest.mark.slow) for name in ("rome", "emmet", "alphaedit", "pmet")),
        ("memit", ("method.prune=2.0",)),
    ],
)
def test_solves_are_in_float64(name, more, statistics):
    lm = load("bfloat16")
    with LinearAlgebra() as watched:
        packaged_editor(statistics, name, *more).edit(lm, requests(2))
    assert watched.seen
    assert set().union(*watched.seen.values()) == {torch.float64}


@dtypes
def test_statistics_are_summed_in_more_digits_than_the_keys_have(dtype, tmp_path):
    """Against float64 sums of the model's own keys."""
    lm, layer, keys = load(dtype), 1, []

    def keep(states: Tensor) -> None:
        keys.append(states.double().clone())

    # a row at a time: no padding
    config: Any = packaged_editor(tmp_path, "memit", "stats.batch_tokens=1", "stats.tokens=2000").config
    store = config.moments
    with on_input(lm.module(lm.layout.mlp_out(layer)), keep):
        moment = store.second_moment(lm, layer)
    rows = torch.cat([batch.reshape(-1, batch.shape[-1]) for batch in keys])
    assert moment.tokens == len(rows) == 2000
    assert moment.matrix.dtype == torch.float64
    expected = rows.T @ rows / len(rows)
    assert (moment.matrix - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("site", ["block", "mlp_out"])
def test_values_have_more_digits_than_the_model(dtype, site, statistics):
    """Their optimization ends near that of the float32 model, in digits that the model's dtype does not have."""
    found = []
    for kind in (dtype, "float32"):
        lm, editor, wanted = load(kind), packaged_editor(statistics, "memit"), requests(3)
        values = optimize_values(lm, wanted, 1, site, editor.config.value, editor.on(lm).contexts)
        assert values.target.dtype == values.initial.dtype == torch.float32
        keys = Subjects(lm, wanted, editor.on(lm).contexts).keys(1)
        assert keys.dtype == torch.float64
        found.append((values, keys))
    (values, keys), (exact, exact_keys) = found
    assert (values.target.to(DTYPES[dtype]).float() != values.target).float().mean() > 0.9
    assert (values.initial.to(DTYPES[dtype]).float() == values.initial).all()
    assert (values.target - exact.target).norm() < 0.1 * exact.target.norm()
    assert (keys - exact_keys).norm() < 0.02 * exact_keys.norm()


@dtypes
def test_losses_are_in_float32(dtype):
    lm = load(dtype)
    ids = torch.arange(5, 15)[None]
    at = torch.tensor([0, 0]), torch.tensor([3, 9])
    assert lm.head.logits_at(ids, torch.ones_like(ids), *at).dtype == torch.float32
    (row,) = lm.head.encode([("Rome is", "old")])
    with torch.no_grad():
        scores = lm.model(input_ids=torch.tensor([row.ids[:-1]])).logits[0, row.start - 1 :].double().log_softmax(-1)
    expected = -scores[range(len(row.target)), list(row.target)].mean().item()
    assert lm.loglikelihood([("Rome is", "old")])[0].nll == pytest.approx(expected, rel=1e-5)


def test_an_edit_of_the_other_dtype_is_refused(statistics, tmp_path):
    lm, wanted = embedded_lm(), requests(1)
    edit_store.save(
        packaged_editor(statistics, "rome").edit(lm, wanted), tmp_path / "edit", lm, wanted, {"name": "rome"}
    )
    with pytest.raises(edit_store.MissingError, match="load the same model, revision and model.dtype"):
        edit_store.load(tmp_path / "edit", load("bfloat16"))
