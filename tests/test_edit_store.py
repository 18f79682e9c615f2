"""Edit directories: what is loaded is what was saved, in another process too; what does not fit or was tampered with
is refused.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import tiny, tiny_lm
from safetensors.torch import load_file, save_file
from torch import Tensor

import edit_cli
from edit_cli.editors.retrieval.base import Fact
from edit_cli.editors.retrieval.lookup import CacheRoute
from edit_cli.edits import store as edit_store
from edit_cli.edits.edit import Factors, WeightDelta
from edit_cli.errors import MissingError, UsageError
from edit_cli.lm.model import LM
from edit_cli.requests import EditRequest

pytestmark = pytest.mark.thin(4)

REQUESTS = [EditRequest("{} lives in", "Ada Lund", "Oslo", "Rome"), EditRequest("Zoë: {} is called", "C", "東京")]
METHOD = {"name": "memit", "layers": [0, 2], "lr": 0.5}


def language_model(dtype: torch.dtype = torch.float32, seed: int = 0, family: str = "gpt2") -> LM:
    model, words = tiny(family, seed)
    return LM(model.to(dtype), words, name=f"tiny-{family}")


def delta(lm: LM, seed: int, layers: tuple[int, ...] = (0, 2)) -> WeightDelta:
    draw = torch.Generator().manual_seed(seed)
    updates: dict[str, Factors | Tensor] = {}
    for layer in layers:
        rows, columns = lm.weight(lm.layout.mlp_out(layer)).shape
        left, right = torch.randn(rows, 2, generator=draw), torch.randn(2, columns, generator=draw)
        updates[f"{lm.layout.mlp_out(layer)}.weight"] = Factors(left * 0.1, right)
    norm = f"{lm.layout.final_norm}.bias"
    updates[norm] = torch.randn(lm.parameter(norm).shape, generator=draw) * 0.1
    return WeightDelta(updates, {"losses": [0.1, float("nan")], "residual_norms": {"2": 1.5}})


def logits(lm: LM) -> Tensor:
    with torch.no_grad():
        return lm.model(input_ids=torch.arange(5, 25).reshape(2, 10), use_cache=False).logits


def saved(lm: LM, directory: Path, edit: WeightDelta | None = None, parent: Path | None = None) -> Path:
    edit_store.save(edit or delta(lm, seed=1), directory, lm, REQUESTS, METHOD, parent)
    return directory


def rewrite(directory: Path, **changes) -> None:
    path = directory / "edit.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_saved_and_loaded_edits_give_the_same_bits(tmp_path, dtype):
    lm = language_model(dtype)
    edit = delta(lm, seed=1)
    saved(lm, tmp_path / "edit", edit)
    with lm.edited(edit):
        expected = logits(lm)
    other = language_model(dtype)
    (loaded,) = edit_store.attach(tmp_path / "edit", other)
    assert torch.equal(logits(other), expected)
    assert isinstance(loaded, WeightDelta) and loaded.info["residual_norms"] == {"2": 1.5}
    other.detach()
    assert torch.equal(logits(other), logits(lm))


NEW_PROCESS = """
import sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from edit_cli.edits import store as edit_store
from edit_cli.lm.model import LM

model, edit, out = sys.argv[1:]
lm = LM(AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16), AutoTokenizer.from_pretrained(model),
name="again")
edit_store.attach(edit, lm)
with torch.no_grad():
    save_file({"logits": lm.model(input_ids=torch.arange(5, 25).reshape(2, 10), use_cache=False).logits}, out)
"""


@pytest.mark.slow
def test_an_edit_on_an_edit_gives_the_same_bits_in_a_new_process(tmp_path):
    lm = language_model(torch.bfloat16)
    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    first, second = delta(lm, seed=1), delta(lm, seed=2, layers=(1, 2))
    saved(lm, tmp_path / "first", first)
    lm.attach(first)
    saved(lm, tmp_path / "second", second, parent=tmp_path / "first")
    lm.attach(second)
    arguments = [str(tmp_path / name) for name in ("model", "second", "out")]
    subprocess.run([sys.executable, "-W", "ignore", "-c", NEW_PROCESS, *arguments], check=True, capture_output=True)
    assert torch.equal(load_file(tmp_path / "out")["logits"], logits(lm))


def test_a_parent_is_nested_and_the_chain_starts_at_the_base(tmp_path):
    lm = language_model()
    edits = [delta(lm, seed=seed) for seed in range(3)]
    for number, edit in enumerate(edits):
        saved(lm, tmp_path / str(number), edit, parent=tmp_path / str(number - 1) if number else None)
        lm.attach(edit)
    expected = logits(lm)
    top = tmp_path / "2"
    assert edit_store.chain(top) == [top / "base" / "base", top / "base", top]
    ids = [edit_store.read_manifest(path)["id"] for path in edit_store.chain(top)]
    assert ids == [edit_store.read_manifest(tmp_path / str(number))["id"] for number in range(3)]
    assert [edit_store.read_manifest(path)["parent"] for path in edit_store.chain(top)] == [None, *ids[:2]]
    other = language_model()
    assert len(edit_store.attach(top, other)) == 3
    assert torch.equal(logits(other), expected)


def test_the_manifest_says_what_was_edited_and_how(tmp_path):
    lm = language_model()
    edit = delta(lm, seed=1)
    identity = edit_store.save(edit, tmp_path / "edit", lm, REQUESTS, METHOD)
    assert sorted(path.name for path in (tmp_path / "edit").iterdir()) == ["edit.json", "edit.safetensors"]
    manifest = edit_store.read_manifest(tmp_path / "edit")
    assert manifest["id"] == identity
    assert (manifest["kind"], manifest["type"], manifest["method"]) == (
        "weights",
        "weights",
        METHOD,
    )
    assert manifest["base_model"] == {
        "name": "tiny-gpt2",
        "id": "tiny-gpt2",
        "revision": None,
        "dtype": "float32",
    }
    assert [EditRequest(**request) for request in manifest["requests"]] == REQUESTS
    assert manifest["touched"] == {name: lm.fingerprint([name]) for name in edit.updates}
    assert manifest["norms"] == pytest.approx(edit.norms())


def test_the_id_depends_on_what_the_edit_does_and_on_nothing_else(tmp_path):
    lm = language_model()
    first = edit_store.save(delta(lm, seed=1), tmp_path / "a", lm, REQUESTS, METHOD)
    assert edit_store.save(delta(lm, seed=1), tmp_path / "b", language_model(), REQUESTS, METHOD) == first
    assert edit_store.save(delta(lm, seed=2), tmp_path / "c", lm, REQUESTS, METHOD) != first
    with lm.edited(delta(lm, seed=3)):
        assert edit_store.save(delta(lm, seed=1), tmp_path / "d", lm, REQUESTS, METHOD) != first


def test_state_with_numbers_as_keys_loads(tmp_path):
    lm = language_model()
    edit = delta(lm, seed=1)
    edit.info = {"by_layer": {10: 1.0, 9: (2, 3)}}
    saved(lm, tmp_path / "edit", edit)
    loaded = edit_store.load(tmp_path / "edit", lm)
    assert isinstance(loaded, WeightDelta) and loaded.info == {"by_layer": {"10": 1.0, "9": [2, 3]}}


def test_a_route_is_stored_too(tmp_path):
    lm = language_model()
    route = CacheRoute([Fact("Ada Lund lives in", "Oslo")], torch.ones(1, 32), None, 30.0)
    edit_store.save(route, tmp_path / "route", lm, REQUESTS[:1], {"name": "lookup"})
    other = language_model()
    edit_store.attach(tmp_path / "route", other)
    assert other.generate(["ada lund  lives in"], 5) == [" Oslo"]
    assert other.loglikelihood([("Ada Lund lives in", "Oslo")])[0].nll < 1e-3


def test_tensors_that_share_memory_are_saved_apart(tmp_path):
    lm = language_model()
    whole = torch.randn(64, 88)
    name, other = (f"{lm.layout.mlp_out(layer)}.weight" for layer in (0, 1))
    edit = WeightDelta({name: whole[:32].T, other: whole[16:48].T})
    saved(lm, tmp_path / "edit", edit)
    loaded = edit_store.load(tmp_path / "edit", lm)
    assert isinstance(loaded, WeightDelta)
    update = loaded.updates[other]
    assert isinstance(update, Tensor) and torch.equal(update, whole[16:48].T)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_the_wrong_base_is_refused_and_the_tensor_named(tmp_path):
    directory = saved(language_model(), tmp_path / "edit")
    name = "transformer.h.0.mlp.c_proj.weight"
    with pytest.raises(MissingError, match=f"made for other weights .*{name} differs"):
        edit_store.attach(directory, language_model(seed=1))
    with pytest.raises(MissingError, match=f"{name} differs.*model.dtype"):
        edit_store.attach(directory, language_model(torch.bfloat16))
    with pytest.raises(MissingError, match=f"this model \\(tiny-llama\\) has no {name}"):
        edit_store.attach(directory, language_model(family="llama"))
    touched = language_model()
    touched.parameter("transformer.h.2.mlp.c_proj.weight").data[3, 3] += 1e-3
    with pytest.raises(MissingError, match=r"h\.2\.mlp\.c_proj\.weight differs"):
        edit_store.attach(directory, touched)
    elsewhere = language_model()
    elsewhere.parameter("transformer.h.1.mlp.c_proj.weight").data[3, 3] += 1e-3  # not what the edit was made for
    edit_store.attach(directory, elsewhere)


def test_an_edit_on_an_edit_is_refused_on_the_bare_model(tmp_path):
    lm = language_model()
    first = delta(lm, seed=1)
    saved(lm, tmp_path / "first", first)
    lm.attach(first)
    directory = saved(lm, tmp_path / "second", delta(lm, seed=2), parent=tmp_path / "first")
    with pytest.raises(MissingError, match="what the edit stands on"):
        edit_store.load(directory, language_model())


def test_nothing_stays_attached_if_the_second_of_a_chain_does_not_fit(tmp_path):
    lm = language_model()
    saved(lm, tmp_path / "first", delta(lm, seed=1))
    with lm.edited(delta(lm, seed=1)):
        directory = saved(lm, tmp_path / "second", delta(lm, seed=2, layers=(1,)), parent=tmp_path / "first")
    other = language_model()
    other.parameter("transformer.h.1.mlp.c_proj.weight").data[0, 0] += 1.0
    before = logits(other)
    with pytest.raises(MissingError, match=r"h\.1\.mlp\.c_proj\.weight differs"):
        edit_store.attach(directory, other)
    assert other.attached == []
    assert torch.equal(logits(other), before)


def test_changed_tensors_are_refused(tmp_path):
    lm = language_model()
    directory = saved(lm, tmp_path / "edit")
    tensors = load_file(directory / "edit.safetensors")
    tensors["transformer.h.0.mlp.c_proj.weight|left"][0, 0] += 1e-3
    save_file(tensors, directory / "edit.safetensors")
    with pytest.raises(MissingError, match="was changed after it was saved"):
        edit_store.load(directory, lm)


@pytest.mark.parametrize(
    "changes",
    [
        {"state": {"info": {"losses": []}}},
        {"touched": {}},
        {"type": "lookup"},
        {"kind": "route"},
        {"id": "0" * 64},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_changed_meaning_is_refused(tmp_path, changes):
    lm = language_model()
    directory = saved(lm, tmp_path / "edit")
    rewrite(directory, **changes)
    with pytest.raises(MissingError, match="was changed after it was saved"):
        edit_store.load(directory, lm)


def forged(directory: Path, name: str) -> None:
    """Name another class and make the id right again, as whoever wants code to be run would."""
    rewrite(directory, type=name)
    manifest = json.loads((directory / "edit.json").read_text())
    rewrite(directory, id=edit_store.identity(directory / "edit.safetensors", manifest))


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "test_edit_store.Planted",
        "edit_cli.lm.model.LM",
        "edit_cli.editors.retrieval.lookup.Lookup",
        "edit_cli.edits.edit.Edit",
        "edit_cli.edits.edit.ModulePatch",
        "edit_cli.edits.edit.nothing",
        "edit_cli.editors.nothing.Edit",
        "edit_cli.editors.retrieval.lookup.CacheRoute.state",
        "edit_cli.editors.../evil.Planted",
        "edit_cli.edits.edit.WeightDelta",
        "edit_cli.edits.edit:WeightDelta",
        "test_edit_store:Planted",
        "test_edit_store/Planted",
        "WeightDelta",
        "memit",
        "counterfact",
        "",
    ],
)
def test_what_is_no_name_of_an_edit_is_refused(tmp_path, name):
    lm = language_model()
    directory = saved(lm, tmp_path / "edit")
    forged(directory, name)
    with pytest.raises(MissingError, match="are not known to this version of edit-cli"):
        edit_store.load(directory, lm)


class Planted(WeightDelta):
    @classmethod
    def from_state(cls, tensors, rest):
        raise AssertionError("code from outside the package was run")


def test_a_missing_or_exchanged_base_is_noticed(tmp_path):
    lm = language_model()
    saved(lm, tmp_path / "first", delta(lm, seed=1, layers=(0,)))
    saved(lm, tmp_path / "other", delta(lm, seed=3, layers=(0,)))
    with lm.edited(delta(lm, seed=1, layers=(0,))):
        directory = saved(lm, tmp_path / "second", delta(lm, seed=2, layers=(2,)), parent=tmp_path / "first")
    base = directory / "base"
    base.rename(tmp_path / "kept")
    with pytest.raises(MissingError, match="base is no edit directory"):
        edit_store.attach(directory, language_model())
    (tmp_path / "other").rename(base)
    with pytest.raises(MissingError, match="base is not the edit that"):
        edit_store.attach(directory, language_model())


def test_what_is_no_edit_directory_is_named(tmp_path):
    lm = tiny_lm("gpt2")
    with pytest.raises(MissingError, match="nowhere is no edit directory: edit.json is missing"):
        edit_store.load(tmp_path / "nowhere", lm)
    reasons = {
        "{": "cannot be read",
        "[]": "holds no object",
        '{"format": 99}': "format 2",
        '{"format": 2}': "id is missing",
    }
    for text, reason in reasons.items():
        (tmp_path / "edit.json").write_text(text)
        with pytest.raises(MissingError, match=reason):
            edit_store.load(tmp_path, lm)


@pytest.mark.parametrize(
    "content", [None, b"", b"garbage" * 40, b"\x80\x04K\x01."], ids=["missing", "empty", "garbage", "pickle"]
)
def test_damaged_tensors_are_named(tmp_path, content):
    lm = language_model()
    directory = saved(lm, tmp_path / "edit")
    file = directory / "edit.safetensors"
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(MissingError, match=r"edit\.safetensors cannot be read"):
        edit_store.load(directory, lm)


# --- saving
# -------------------------------------------------------------------------------------------------------------


def test_an_edit_directory_is_replaced_but_nothing_else_is(tmp_path):
    lm = language_model()
    directory = saved(lm, tmp_path / "edit", delta(lm, seed=1))
    first = edit_store.read_manifest(directory)["id"]
    saved(lm, directory, delta(lm, seed=2))
    assert edit_store.read_manifest(directory)["id"] != first
    assert [path.name for path in tmp_path.iterdir()] == ["edit"]

    precious = tmp_path / "thesis"
    precious.mkdir()
    saved(lm, precious)  # empty: may be used
    (precious / "edit.json").unlink()
    with pytest.raises(UsageError, match="thesis exists and is no edit directory"):
        saved(lm, precious)
    assert (precious / "edit.safetensors").is_file()
    with pytest.raises(UsageError, match="is no edit directory"):
        saved(lm, precious / "edit.safetensors")


def test_an_edit_may_replace_the_one_that_it_stands_on(tmp_path):
    lm = language_model()
    first, second = delta(lm, seed=1), delta(lm, seed=2)
    saved(lm, tmp_path / "edit", first)
    lm.attach(first)
    saved(lm, tmp_path / "edit", second, parent=tmp_path / "edit")
    lm.attach(second)
    other = language_model()
    assert len(edit_store.attach(tmp_path / "edit", other)) == 2
    assert torch.equal(logits(other), logits(lm))


def test_what_cannot_be_written_is_one_line_and_leaves_the_old_edit(tmp_path, monkeypatch):
    lm = language_model()
    directory = saved(lm, tmp_path / "edit")
    before = edit_store.read_manifest(directory)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(edit_store, "write_tensors", full)
    with pytest.raises(MissingError, match="edit cannot be written: .*No space left.*make room"):
        saved(lm, directory, delta(lm, seed=2))
    assert edit_store.read_manifest(directory) == before
    assert [path.name for path in tmp_path.iterdir()] == ["edit"]
    (tmp_path / "file").write_text("")
    with pytest.raises(MissingError, match="cannot be written"):
        edit_store.save(delta(lm, seed=1), tmp_path / "file" / "edit", lm, [], {})


def test_nothing_in_the_package_reads_or_writes_pickles():
    package = Path(edit_cli.__file__).parent
    sources = {path: path.read_text() for path in package.rglob("*.py")}
    assert len(sources) > 20
    banned = ("import pickle", "torch.save(", "torch.load(", "allow_pickle=True", "cloudpickle")
    assert {(path.name, word) for path, text in sources.items() for word in banned if word in text} == set()
