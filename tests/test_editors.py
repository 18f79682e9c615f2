"""Conformance: what every method in conf/method must do, on Conv1D and on Linear projections."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache

import pytest
import torch
from embedded import embedded_lm, requests, same_bits, snapshot, world
from learners import examples_of, quick_editor

from edit_cli.config.catalog import names
from edit_cli.editors.base import Context, Editor
from edit_cli.editors.locate import ultraedit
from edit_cli.editors.retrieval.serac import SeracRoute
from edit_cli.edits import store as edit_store
from edit_cli.edits.edit import Edit, WeightDelta
from edit_cli.errors import RejectedRequest, UsageError
from edit_cli.requests import EditRequest
from edit_cli.testing import MethodConformance, likelihoods
from edit_cli.testing.conformance import MODELS, answers

pytestmark = pytest.mark.thin(8)


@pytest.fixture(scope="module")
def editor(statistics):
    """editor(name, *overrides): as the command line would build it for the embedded model, with few tokens of
    statistics; kind: of the model that it is trained on.
    """
    return lambda name, *overrides, kind=KIND: quick_editor(statistics, name, [model(kind)], *overrides)


@cache
def model(kind: str):
    return MODELS[kind]()


KIND = "Conv1D"  # of the projections of the model that every method is tried on
LONG = (
    "enn",
    "ke",
    "malmen",
    "mend",
    "mend-identity",
    "retrain",
    "serac",
)  # are trained first, or train the model anew


class TestEveryMethod(MethodConformance):
    """The suite that plug-ins are held to, over all packaged methods."""

    @pytest.fixture(
        scope="class",
        params=[
            pytest.param(
                (kind, name), id=f"{kind}-{name}", marks=pytest.mark.slow if kind != KIND and name in LONG else ()
            )
            for kind in MODELS
            for name in names("method")
        ],
    )
    @classmethod
    def pair(cls, request):
        return request.param

    @pytest.fixture(scope="class")
    @classmethod
    def method(cls, pair, editor):
        return editor(pair[1], kind=pair[0]).method

    @pytest.fixture(scope="class")
    @classmethod
    def context(cls, method, lm):
        return Context(examples_of(method))

    @pytest.fixture(scope="class")
    @classmethod
    def lm(cls, pair):
        return model(pair[0])

    def test_the_new_answers_become_likelier(self, made, lm):
        # after a few steps of training its classifier lets nothing in; tests/test_serac.py has one that does
        if isinstance(made.edit, SeracRoute):
            pytest.skip("its classifier was hardly trained")
        if isinstance(made.edit, WeightDelta) and not made.edit.updates:  # of method=none
            with lm.edited(made.edit):
                assert answers(lm, made.wanted) == made.answers
            return
        super().test_the_new_answers_become_likelier(made, lm)

    def test_a_sequence_goes_on_from_what_was_saved(self, made, method, lm, context, tmp_path):
        if lm is model("Linear"):
            pytest.skip("once for every method is long enough")
        super().test_a_sequence_goes_on_from_what_was_saved(made, method, lm, context, tmp_path)


# Methods that write fact after fact, each on what those before it have left; and those whose facts share one
# optimization, one solve or one block of factors, so that their number is part of the method.
IN_TURN = (
    *("defer", "grace", "icl-oracle", "ike", "kn", "lookup", "none", "r-rome", "rag", "rome", "rp", "serac"),
    *("tpatcher", "wise"),
)
TOGETHER = (
    *("alphaedit", "blue", "emmet", "memit", "memit-merge", "pmet", "ultraedit"),
    *("enn", "ke", "malmen", "mend", "mend-identity"),
    *("ewc", "ft", "ft-l", "ft-m", "ft-mixed", "locft", "lora", "melo", "replay", "retrain"),
)


def awkward() -> list[EditRequest]:
    """A fact, another wording with the old answer (known before, lost by the first), a correction, and another fact."""
    case = world("tune")[0]
    fact = case.requests[0]
    wording = next(probe.prompt for probe in case.probes if probe.kind == "paraphrase")
    known = EditRequest(wording.replace(fact.subject or "", "{}"), fact.subject, fact.target_true or "")
    (other,) = requests(1, start=1)
    return [fact, known, EditRequest(fact.prompt, fact.subject, other.target_new), other]


@pytest.mark.parametrize("name", names("method"))
def test_no_setting_hides_a_step_that_commands_take(name, editor):
    made = editor(name).on(model("Conv1D"))
    before = ("require", "refuse_kind")  # asked of the class, not of an editor at work
    steps = [step for step in vars(Editor) if callable(getattr(Editor, step)) and not step.startswith("_")]
    steps = [step for step in steps if step not in (*before, "Config")]
    assert "warm_up" in steps and all(callable(getattr(made, step)) for step in steps)


def test_every_method_says_what_batches_mean_to_it():
    assert sorted((*IN_TURN, *TOGETHER)) == sorted(names("method"))


@pytest.mark.parametrize("name", IN_TURN)
def test_what_is_written_does_not_hang_on_how_many_facts_come_at_once(name, editor):
    """One by one, and two at a time: the same answers to the facts and to what is near them."""
    lm, wanted = model("Conv1D"), awkward()
    near = [probe.prompt for probe in world("tune")[0].probes][:5]
    pairs = [*((r.text, r.target_new) for r in wanted), *((prompt, wanted[0].target_new) for prompt in near)]
    found = []
    for sizes in ((1, 1, 1, 1), (2, 2)):
        made, left = editor(name), list(wanted)
        for size in sizes:
            lm.attach(made.edit(lm, left[:size]))
            del left[:size]
        found.append(
            ([score.nll for score in lm.loglikelihood(pairs)], lm.generate([prompt for prompt, _ in pairs], 4))
        )
        for _ in sizes:
            lm.detach()
    # the sum of two updates of one weight is rounded once, or twice
    rel = 1e-3 if name in ("kn", "rome", "r-rome") else 0.0
    (likely, texts), (together, texts_together) = found
    assert together == pytest.approx(likely, rel=rel, abs=rel)
    assert texts_together == texts


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("memit", ("method.past_keys=write",)), ("memit", ("method.past_keys=post",)), ("alphaedit", ()),
        ("ultraedit", ("method.begin_with=0",)), ("ewc", ()), ("replay", ("method.every=1",)), ("enn", ()),
    ],
)  # fmt: skip
def test_an_edit_that_is_no_number_leaves_nothing_in_its_editor(name, settings, editor, monkeypatch):
    """It is not kept, so nothing may come of it: the next one is as if it had not been tried."""
    lm, wanted = model("Conv1D"), requests(8)
    made, fresh = editor(name, *settings), editor(name, *settings)
    with monkeypatch.context() as patch:
        patch.setattr(Edit, "is_finite", property(lambda edit: False))
        made.edit(lm, wanted[:4])
    again, alone = (one.edit(lm, wanted[4:]).state()[0] for one in (made, fresh))
    assert again.keys() == alone.keys()
    assert all(torch.equal(again[part], alone[part]) for part in alone)


def test_moments_do_not_keep_a_gradient_that_is_infinite(editor, monkeypatch):
    lm, wanted = model("Conv1D"), requests(6)
    made = editor("ultraedit", "method.begin_with=0", "method.modules=[mlp_out:4]").on(lm)
    made.edit(wanted[:2])
    before = {shape: (kept.count, kept.mean.tolist()) for shape, kept in made.moments.items()}
    real = ultraedit._inputs_and_gradients

    def infinite(*arguments):
        found = real(*arguments)
        for _, gradient in found.values():
            gradient[0, 0] = float("inf")
        return found

    monkeypatch.setattr(ultraedit, "_inputs_and_gradients", infinite)
    assert not made.edit(wanted[2:4]).is_finite
    assert before == {shape: (kept.count, kept.mean.tolist()) for shape, kept in made.moments.items()}
    monkeypatch.undo()
    assert made.edit(wanted[4:]).is_finite


@pytest.mark.parametrize("name", ["memit", "rome", "emmet", "ft"])
def test_orientation_does_not_matter(name, editor):
    """On a Conv1D and on the Linear that computes the same, updates are each other's transpose."""
    wanted = requests(2)
    conv, linear = (editor(name).edit(model(kind), wanted) for kind in ("Conv1D", "Linear"))
    assert conv.updates.keys() == linear.updates.keys()
    for parameter in conv.updates:
        expected = conv.stored(model("Conv1D"), parameter).T
        torch.testing.assert_close(linear.stored(model("Linear"), parameter), expected, rtol=2e-3, atol=1e-5)


def test_a_saved_edit_gives_identical_logits_in_a_new_process(editor, tmp_path):
    lm, wanted = embedded_lm(), requests(2)
    edit = editor("memit").edit(lm, wanted)
    edit_store.save(edit, tmp_path / "edit", lm, wanted, {"name": "memit"})
    with lm.edited(edit):
        here = likelihoods(lm, wanted)
    code = (
        "import sys, json; sys.path.insert(0, sys.argv[2]); from embedded import embedded_lm\n"
        "from edit_cli.edits import store\n"
        "lm = embedded_lm(); store.attach(sys.argv[1], lm)\n"
        "pairs = [tuple(pair) for pair in json.loads(sys.argv[3])]\n"
        "print(json.dumps([score.nll for score in lm.loglikelihood(pairs)]))"
    )
    pairs = json.dumps([(request.text, request.target_new) for request in wanted])
    folder = str(__import__("pathlib").Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "edit"), folder, pairs], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout.splitlines()[-1]) == here


def test_edits_stack_and_come_off_in_reverse(editor):
    lm, wanted = embedded_lm(), requests(3)
    untouched = snapshot(lm)
    for name, request in zip(("memit", "lookup", "ft"), wanted, strict=True):
        lm.attach(editor(name).edit(lm, [request]))
    assert all(
        score.hits == (True,) * len(score.hits) for score in lm.loglikelihood([(r.text, r.target_new) for r in wanted])
    )
    for _ in wanted:
        lm.detach()
    assert same_bits(snapshot(lm), untouched)


def test_emmet_with_one_request_is_rome_for_the_same_key_and_value(editor):
    """Both meet the constraint exactly: what the edited projection gives for the averaged key moves by the whole
    residual.
    """
    lm, wanted = model("Conv1D"), requests(1)
    emmet = editor("emmet", "method.layers=[2]").edit(lm, wanted)
    rome = editor("rome", "method.layers=[2]", "method.variant=r").edit(lm, wanted)
    (first,), (second,) = emmet.updates.values(), rome.updates.values()
    cosine = torch.nn.functional.cosine_similarity(first.right, second.right)
    assert cosine.item() > 0.5  # other prefixes, so other averaged keys; the same statistics


@pytest.mark.parametrize("variant", ["original", "r", "p"])
def test_rome_variants_differ_in_their_keys_and_all_work(variant, editor):
    lm, wanted = model("Conv1D"), requests(1)
    edit = editor("rome", f"method.variant={variant}").edit(lm, wanted)
    (gain,) = edit.info["gains"]
    assert 0 < gain <= 1 + 1e-9
    with lm.edited(edit):
        assert lm.loglikelihood([(wanted[0].text, wanted[0].target_new)])[0].hits == (True,)


def test_norm_constraint_holds_for_every_weight(editor):
    lm, wanted = model("Conv1D"), requests(4)
    edit = editor("ft-l", "method.norm_constraint=1.0e-3").edit(lm, wanted)
    largest = max(float(lm_update.abs().max()) for lm_update in edit.updates.values())
    assert 0.999e-3 < largest <= 1.001e-3
    free = editor("ft", "method.lr=1.0e-2").edit(lm, wanted)
    assert max(float(update.abs().max()) for update in free.updates.values()) > 1.0e-3


def test_facts_about_one_subject_are_reported(editor, monkeypatch):
    lm = model("Conv1D")
    notes: list[str] = []
    monkeypatch.setattr(lm.monitor, "note", notes.append)
    request = requests(1)[0]
    again = EditRequest(request.prompt, request.subject, requests(2)[1].target_new)
    editor("memit").edit(lm, [request, again])
    assert any("same key" in note for note in notes)
    with pytest.raises(UsageError, match="dependent keys"):
        editor("emmet", "method.epsilon=0.0").edit(lm, [request, again])


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("memit", "method.layers=[]", "method.layers is empty"),
        ("memit", "method.layers=[9]", "layer 9 does not exist"),
        ("rome", "method.variant=q", "method.variant=q: choose"),
        ("ft", "method.part=head", "method.part=head: choose"),
        ("ft", "method.objective=x", "method.objective=x: choose"),
        ("ft-l", "method.norm_constraint=-1.0", "method.norm_constraint=-1.0: give a number above 0"),
        ("lookup", "method.mode=x", "method.mode=x: choose"),
        ("memit", "method.context.weighting=x", "method.context.weighting=x: choose"),
    ],
)
def test_wrong_settings_are_refused_by_name(name, override, message, editor):
    with pytest.raises(UsageError) as caught:
        editor(name, override).edit(model("Conv1D"), requests(1))
    assert message in str(caught.value)


def test_requests_that_a_method_cannot_work_on_are_rejected_alone(editor):
    lm = model("Conv1D")
    with pytest.raises(RejectedRequest, match="needs a subject"):
        editor("memit").check(lm, EditRequest("Paris is in", None, "Peru"))
    editor("ft").check(lm, EditRequest("Paris is in", None, "Peru"))
    with pytest.raises(RejectedRequest, match="target is empty"):
        editor("ft").check(lm, EditRequest("Paris is in", None, "  "))
