"""Facts taken out of saved edits: what is left is what an edit of the other facts with the same values is."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import invoke
from embedded import embedded_lm, packaged_editor, requests, same_bits, snapshot

import edit_cli
from edit_cli.config.as_made import method_node
from edit_cli.config.build import plain_containers
from edit_cli.config.composed import composed
from edit_cli.editors.base import SOLVED, VALUES_KEPT
from edit_cli.editors.locate import memit, rome
from edit_cli.editors.locate.value_optimization import Values
from edit_cli.edits import store as edit_store
from edit_cli.edits.edit import Factors, WeightDelta
from edit_cli.errors import MissingError, UsageError
from edit_cli.experiment.saved_steps import SavedSteps
from edit_cli.experiment.setup import method_of
from edit_cli.requests import EditRequest

pytestmark = pytest.mark.thin(4)

ONE = "method.layers=[3]"
FEW = ("model=tiny-gpt2", "method.value.steps=2", "method.context.prefixes=['It is said. ']")
HOME = EditRequest("{} was born in", "Jormia Stenenen", "Paris")
CASES = {
    "emmet": ((ONE,), SOLVED),
    "memit": ((ONE, "method.covariance_weight=auto"), SOLVED),
    "memit-prune": ((ONE, "method.prune=1.2", "method.past_keys=write"), SOLVED),
    "alphaedit": ((ONE,), SOLVED),
    "rome": ((ONE,), SOLVED),
    "memit-several": (("method.layers=[2,3]",), VALUES_KEPT),
    "memit-merge": ((ONE,), VALUES_KEPT),
}


QUICK = ("emmet", "rome", "memit-merge")  # one of each way


class Recorded:
    """In the place of the search for values: it looks, remembers, and then answers from memory alone."""

    def __init__(self, look) -> None:
        self.look, self.asked = look, 0
        self.known: dict[tuple, Values] = {}

    def __call__(self, lm, wanted, layer, site, options, contexts, groups=None):
        groups = groups or [[i] for i in range(len(wanted))]
        keys = [(layer, *(wanted[i] for i in group)) for group in groups]
        if not set(keys) <= self.known.keys():
            self.asked += 1
            found = self.look(lm, wanted, layer, site, options, contexts, groups)
            self.known |= {key: found.of(column) for column, key in enumerate(keys)}
        return Values.joined([self.known[key] for key in keys])


def dense(edit) -> dict[str, torch.Tensor]:
    return {
        name: update.dense() if isinstance(update, Factors) else update.T for name, update in edit.updates.items()
    }  # tiny-gpt2's matrices are stored turned


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_without_a_fact_it_is_the_edit_of_the_others_with_the_same_values(name, cache_dir, monkeypatch):
    (overrides, way), lm = CASES[name], embedded_lm()
    method = name.removesuffix("-prune").removesuffix("-several")
    editor = packaged_editor(cache_dir, method, *FEW, *overrides)
    wanted, before = [*requests(3), HOME], snapshot(lm)
    wanted[3] = EditRequest(HOME.prompt, wanted[0].subject, HOME.target_new)  # one subject in two facts
    search = Recorded(memit.optimize_values)
    for module in (memit, rome):
        monkeypatch.setattr(module, "optimize_values", search)
    whole = editor.edit(lm, wanted)
    revoked, left = 3 if method == "memit-merge" else 1, list(wanted)
    del left[revoked]
    looks = search.asked
    with monkeypatch.context() as patch:
        if way == SOLVED:
            patch.setattr(lm.model, "forward", lambda *_, **__: pytest.fail("the model was asked"))
        editor.reset()
        remade = editor.on(lm).without(wanted, {revoked}, whole, whole.by_fact)
    assert remade.way == way
    assert search.asked - looks == (method == "memit-merge")  # the split group alone
    editor.reset()
    wished, found = dense(editor.edit(lm, left)), dense(remade.edit)
    assert found.keys() == wished.keys()
    for part, update in wished.items():
        assert float((found[part] - update).norm() / update.norm()) < 1e-5
        assert float((found[part] - dense(whole)[part]).norm() / update.norm()) > 1e-2  # the fact did count
    assert remade.edit.memory.keys() == whole.memory.keys()
    again = editor.on(lm).without(left, {0}, remade.edit, remade.edit.by_fact)  # and once more
    assert again.way == SOLVED or name == "memit-several"
    assert len(again.edit.info["losses"]) == 2
    assert same_bits(before, snapshot(lm)) and not lm.attached


def test_what_is_kept_is_small_and_not_needed(cache_dir, tmp_path):
    lm = embedded_lm()
    editor = packaged_editor(cache_dir, "memit", *FEW)
    wanted = requests(2)
    edit_store.save(editor.edit(lm, wanted), tmp_path / "e", lm, wanted, {"name": "memit"})
    kept, edit = (tmp_path / "e" / name for name in ("facts.safetensors", "edit.safetensors"))
    assert kept.stat().st_size < edit.stat().st_size / 4  # two states a fact; four layers have a key and a share each
    assert sorted(edit_store.by_fact(tmp_path / "e")) == ["initial", "losses", "reached", "steps", "target"]
    kept.write_bytes(kept.read_bytes()[:-1] + b"\1")
    with pytest.raises(MissingError, match=r"facts\.safetensors was changed.*delete facts\.safetensors"):
        edit_store.by_fact(tmp_path / "e")
    kept.unlink()
    assert edit_store.by_fact(tmp_path / "e") == {}
    edit_store.verify(tmp_path / "e")
    assert edit_store.load(tmp_path / "e", lm).touches(lm)


@pytest.fixture(scope="module")
def stacked(tmp_path_factory, cache_dir):
    """A folder with an edit of three facts by EMMET, and one of another fact by fine-tuning on top of it."""
    folder, lm = tmp_path_factory.mktemp("undo"), embedded_lm()
    home = {"model": "tiny-gpt2"}, {"cache_dir": str(cache_dir), "stats.documents": 40}
    short = {"method.value.steps": 3, "method.layers": [3], "method.context.prefixes": ["It is said. "]}
    facts = [
        EditRequest("{} plays the", "Jormia Stenenen", "organ"),
        EditRequest("{} was born in", "Jortia Hovofeld", "Paris"),
        EditRequest("{} was born in", "Jormia Stenenen", "Rome"),
    ]
    other = [EditRequest("{} plays the", "Jortia Hovofeld", "organ")]
    parent = None
    for method, settings, wanted, name in (("emmet", short, facts, "a"), ("ft", {"method.steps": 2}, other, "b")):
        made = composed("edit", {**home[0], "method": method}, {**home[1], **settings})
        edit = method_of(made.node.method).begin(lm).edit(wanted)
        path = folder / name / "edits" / "0000"
        edit_store.save(edit, path, lm, wanted, {"name": method, **made.plain["method"]}, parent)
        lm.attach(edit)
        parent = path
    lm.detach(), lm.detach()
    return folder


@pytest.fixture
def there(stacked, monkeypatch, cache_dir, tmp_path):
    monkeypatch.chdir(stacked)
    monkeypatch.setenv("COLUMNS", "200")
    return SimpleNamespace(run=lambda *words: invoke(cache_dir, *words), out=str(tmp_path / "out"), cache=cache_dir)


def test_the_command_leaves_an_edit_that_works_and_says_what_it_came_from(there):
    where = f"cache_dir={there.cache}"
    ended = there.run("undo", "b/edits/0000", "--fact", "Jormia Stenenen was born in", "--out", there.out, where)
    assert (ended.code, ended.last) == (0, there.out), ended.err
    told = " ".join(ended.err.split())
    assert "revoked: Jormia Stenenen was born in → Rome" in told
    assert "2 facts of 3 left: solved again from stored keys and values" in told
    assert f"b/edits/0000 (1 fact) lies on top of it and is not in {there.out}" in told
    old, new = (edit_store.read_manifest(path) for path in ("a/edits/0000", there.out))
    assert new["undone"] == {"of": old["id"], "revoked": [old["requests"][2]], "way": SOLVED}
    assert new["requests"] == old["requests"][:2] and new["parent"] is None
    same = {key: value for key, value in new["method"].items() if key != "moments"}
    assert same == {key: value for key, value in old["method"].items() if key != "moments"}
    assert new["method"]["moments"]["documents"] == 40  # what is no place is as it was
    lm = embedded_lm()
    with lm.edited(edit_store.load(there.out, lm)):
        assert lm.attached
    listed = there.run("edits", there.out, "a", "--all")
    assert listed.code == 0 and f"without 1 fact of {old['id'][:8]}" in listed.words
    assert "3 Jormia Stenenen was born in → Rome" in listed.words


def test_where_nothing_was_kept_the_others_are_edited_again(there, tmp_path):
    lm, facts = embedded_lm(), requests(2)
    about = edit_store.read_manifest("b/edits/0000")["method"]
    editor = packaged_editor(there.cache, "ft", "model=tiny-gpt2", "method.steps=2")
    edit_store.save(editor.edit(lm, facts), tmp_path / "e", lm, facts, about)
    ended = there.run("undo", str(tmp_path / "e"), "--fact", "1", "--out", there.out)
    assert ended.code == 0 and "edited again from the beginning" in " ".join(ended.err.split()), ended.err
    editor.reset()
    alone = editor.edit(lm, facts[1:])
    found = edit_store.load(there.out, lm)
    assert isinstance(found, WeightDelta)
    assert found.updates.keys() == alone.updates.keys()
    for name in alone.updates:
        torch.testing.assert_close(found.stored(lm, name), alone.stored(lm, name))


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("a", "--fact", "4"), 2, "--fact 4 is none of the 3 facts of a/edits/0000: give a number or a subject"),
        (("a", "--fact", "Nobody"), 2, "--fact Nobody is none of the 3 facts"),
        (("a", "--fact", "Jormia Stenenen"), 2, "is 2 facts (1: Jormia Stenenen plays the → organ; 3:"),
        (("b", "--fact", "1"), 2, "has no other fact, so nothing would be left of it: what it stands on is there"),
        (("b", "--fact", "1", "--fact", "Jortia Hovofeld was born in"), 2, "revoke those of one"),
        (("a", "--fact", "1", "nonsense"), 2, "'nonsense' is no setting: write KEY=VALUE"),
        (("a", "--fact", "1", "method=nonsense"), 3, "nonsense, which is no method here"),
        (("a", "--fact", "1", "corpus=nonsense"), 2, "nonsense"),
        (("a", "--fact", "1", "method.epsilon=-1"), 2, "method.epsilon=-1"),
        (("nowhere", "--fact", "1"), 3, "nowhere is no edit directory"),
    ],
)
def test_what_cannot_be_taken_out_is_told_before_a_model_is_loaded(there, words, code, told, monkeypatch):
    monkeypatch.setattr("edit_cli.experiment.saved_edits.load_model", lambda *_: pytest.fail("it was loaded"))
    ended = there.run("undo", *words, "--out", there.out)
    assert ended.code == code and told in ended.error and not Path(there.out).exists()


def test_a_file_gives_a_method_values_and_nothing_else(there):
    told, model, file = edit_store.read_manifest("a/edits/0000")["method"], {"model": "tiny-gpt2"}, Path("edit.json")
    moments = told["moments"]
    node = method_node(told, model, {}, ["method.context.seed=7"], file)
    assert (node.value.steps, node.context.seed, node.moments.documents) == (3, 7, 40)
    assert node.moments.cache_dir != moments["cache_dir"]  # a place of another machine
    for changed, error, words in (
        ({"context": {"starts": ["${oc.env:HOME}"]}}, MissingError, r"method holds \$"),
        ({"moments": {**moments, "import_npz": "/etc/x.npz"}}, UsageError, "give stats.import_npz=FILE"),
        ({"moments": {**moments, "corpus": {"type": "text-file", "path": "/x"}}}, UsageError, "give corpus=NAME"),
        ({"name": "os.system"}, MissingError, "no method here"),
    ):
        with pytest.raises(error, match=words):
            method_node({**told, **changed}, model, {}, [], file)


# --- sequences
# ---------------------------------------------------------------------------------------------------

STEPS = (
    EditRequest("{} plays the", "Jormia Stenenen", "organ"),
    EditRequest("{} was born in", "Jortia Hovofeld", "Paris"),
    EditRequest("{} was born in", "Jormia Stenenen", "Rome"),
)


def in_steps(folder: Path, cache_dir: Path, method: str, *settings: str, room: float | None = None) -> Path:
    """The saved steps of a sequence of `STEPS`, a fact each; the model is as before."""
    lm = embedded_lm()
    editor = packaged_editor(cache_dir, method, "model=tiny-gpt2", *settings)
    about = {"name": method, "type": type(editor).__name__}
    about |= plain_containers(composed("edit", {"method": method, "model": "tiny-gpt2"}, {}, settings).node.method)
    saved = SavedSteps(folder / "edits", lm, editor.on(lm), room)
    for number, request in enumerate(STEPS):
        edit = editor.edit(lm, [request])
        saved.save(number, edit, [request], {**about, "made": {"seconds": 0.1, "step": number}})
        lm.attach(edit)
        saved.attached(number, about)
    while lm.attached:
        lm.detach()
    return folder


@pytest.mark.parametrize(
    ("method", "settings", "room"),
    [
        ("ft", ("method.steps=3",), None),
        pytest.param("ft", ("method.steps=3",), 0.1, marks=pytest.mark.slow),  # only the sum of all steps is left
        pytest.param("grace", ("method.steps=5",), None, marks=pytest.mark.slow),
    ],
)
def test_a_sequence_without_a_fact_is_that_of_the_others(cache_dir, tmp_path, method, settings, room):
    lm, run = embedded_lm(), in_steps(tmp_path / "run", cache_dir, method, *settings, room=room)
    assert bool(list((run / "edits").glob("state-*"))) == (room is not None)
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    untouched, out = snapshot(lm), tmp_path / "out"
    edit_cli.undo(run, ["Jortia Hovofeld"], out, lm, [f"cache_dir={cache_dir}"])
    assert same_bits(untouched, snapshot(lm)) and not lm.attached
    assert before == {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    (first, last) = (edit_store.read_manifest(out / name) for name in ("00000", "00002"))
    assert [one["target_new"] for step in (first, last) for one in step["requests"]] == ["organ", "Rome"]
    assert [request["target_new"] for request in last["undone"]["revoked"]] == ["Paris"] and "undone" not in first
    asked = [(request.text, request.target_new) for request in STEPS]
    edits = edit_cli.attach(out, lm)
    found = [likelihood.nll for likelihood in lm.loglikelihood(asked)]
    for _ in edits:
        lm.detach()
    editor = packaged_editor(cache_dir, method, "model=tiny-gpt2", *settings)
    for request in (STEPS[0], STEPS[2]):
        lm.attach(editor.edit(lm, [request]))
    assert found == pytest.approx([likelihood.nll for likelihood in lm.loglikelihood(asked)], abs=1e-6)
    lm.detach(), lm.detach()


def test_what_cannot_be_taken_out_of_a_sequence_is_told(cache_dir, tmp_path, cli):
    in_steps(Path("run"), cache_dir, "ft", "method.steps=1")
    for words, told in (
        (("run", "--fact", "1"), "--fact 1 is none of the 3 facts of run/edits: give a subject or a statement"),
        (("run", "--fact", "Jormia Stenenen"), "is 2 facts (00000/1: Jormia Stenenen plays the → organ; 00002/1:"),
        (("run/edits/00001", "--fact", "2"), "--fact 2 is none of the 1 fact of run/edits/00001"),
        (("run", *(word for one in STEPS for word in ("--fact", one.text))), "nothing would be left of it"),
    ):
        ended = cli("undo", *words, "--out", "out")
        assert ended.code == 2 and told in ended.error and not Path("out").exists()
    ended = cli("undo", "run/edits/00001", "--fact", "1", "--out", "out", f"cache_dir={cache_dir}")
    assert (ended.code, ended.last) == (0, "out"), ended.err
    told = " ".join(ended.err.split())
    assert "revoked: Jortia Hovofeld was born in → Paris" in told
    assert "2 facts of 3 left: steps from run/edits/00001 on were edited again" in told
    assert cli("ask", "out", "Jormia Stenenen plays the", "--edited-only", "--max-new-tokens", "1").code == 0


def test_python_undoes_what_the_command_undoes(there, tmp_path):
    lm, where = embedded_lm(), f"cache_dir={there.cache}"
    words = ("undo", "b/edits/0000", "--fact", "Jormia Stenenen was born in", "--out", there.out, where)
    assert there.run(*words).code == 0
    edit_id = edit_cli.undo("b/edits/0000", ["Jormia Stenenen was born in"], tmp_path / "mine", lm, [where])
    assert edit_id == edit_store.read_manifest(there.out)["id"] and not lm.attached
    edit_cli.undo("a", [3], tmp_path / "again", lm, [where])
    assert edit_store.read_manifest(tmp_path / "again")["id"] == edit_id
    with lm.edited(edit_store.load("a/edits/0000", lm)), pytest.raises(UsageError, match="has edits in place"):
        edit_cli.undo("a", [3], tmp_path / "no", lm)
