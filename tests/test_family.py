"""The locate-then-edit family on the embedded model: what each method does differently, options that compose, and
sequences.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from embedded import Prepared, embedded_lm, prepared, requests, same_bits, snapshot, world
from families import NOT_ADDITIVE, tiny_lm
from hydra import compose, initialize_config_module
from oracle import plain_update, plain_value

from edit_cli.config.build import register_resolvers
from edit_cli.editors.locate.base import Subjects
from edit_cli.editors.locate.blue import BLUE
from edit_cli.editors.locate.context_prefixes import ContextConfig, sample_contexts
from edit_cli.editors.locate.emmet import EMMET
from edit_cli.editors.locate.memit import MEMIT
from edit_cli.editors.locate.memit_merge import MEMITMerge
from edit_cli.editors.locate.pmet import PMET
from edit_cli.editors.locate.value_batch import ValueConfig
from edit_cli.editors.locate.value_optimization import optimize_values
from edit_cli.edits import store as edit_store
from edit_cli.edits.edit import WeightDelta
from edit_cli.errors import UsageError
from edit_cli.experiment.setup import method_of
from edit_cli.lm.layout import attention_out
from edit_cli.requests import EditRequest
from edit_cli.statistics.moments import MomentStore

pytestmark = pytest.mark.thin(6)

SPREADING = ["memit", "emmet", "pmet", "alphaedit", "blue", "memit-merge"]
FAMILY = [*SPREADING, "rome", "r-rome"]
PREFIXES = ContextConfig(prefixes=["The city", "I went to the road and so on", "You"])
REQUESTS = [
    EditRequest("The mother tongue of {} is", "Anna Bo", "French"),
    EditRequest("{} is a", "Paris", "very big city"),
    EditRequest("So it was that {} and", "Tom of Tim", "You"),
    EditRequest("In the city of {}, people", "Anna Bo", "speak"),
]


@pytest.fixture(scope="module")
def editor(statistics):
    def make(name: str, *overrides: str):
        register_resolvers()
        with initialize_config_module("edit_cli.conf", version_base="1.3"):
            config = compose("evaluate", [f"method={name}", f"cache_dir={statistics}", "stats.tokens=6000", *overrides])
        return Prepared(method_of(config.method))

    return make


@pytest.fixture(scope="module")
def lm():
    return embedded_lm()


def hits(lm, wanted) -> int:
    return sum(all(score.hits) for score in lm.loglikelihood([(r.text, r.target_new) for r in wanted]))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# --- values
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_two_branches_are_optimized_together_as_the_plain_way_does(family):
    lm = tiny_lm(family)
    lm.model.double()
    contexts, options = (
        sample_contexts(lm, PREFIXES),
        ValueConfig(steps=8, clamp_norm_factor=2.0, settle_kl=0.5, batch_tokens=60),
    )
    found = optimize_values(lm, REQUESTS, 1, "branches", options, contexts)
    alone = optimize_values(lm, REQUESTS, 1, "mlp_out", options, contexts)
    for number, request in enumerate(REQUESTS):
        value, steps, loss = plain_value(lm, request, 1, "branches", options, contexts)
        assert relative(found.target[:, number], value) < 1e-6
        assert (found.steps[number], found.losses[number]) == (steps, pytest.approx(loss, rel=1e-6))
    assert relative(alone.target, found.target) > 1e-3


@pytest.mark.parametrize("options", [ValueConfig(mpes=1), ValueConfig(mpes=3), ValueConfig(settle_kl=0.01)], ids=str)
def test_early_stops_are_those_of_the_plain_way(options, lm):
    wanted, contexts = requests(4), sample_contexts(lm, PREFIXES)
    found = optimize_values(lm, wanted, 3, "block", options, contexts)
    whole = optimize_values(lm, wanted, 3, "block", ValueConfig(), contexts)
    assert found.steps != whole.steps and all(few <= many for few, many in zip(found.steps, whole.steps, strict=True))
    for number, request in enumerate(wanted):
        value, steps, loss = plain_value(lm, request, 3, "block", options, contexts)
        assert (found.steps[number], found.losses[number]) == (steps, pytest.approx(loss, rel=1e-3))
        assert relative(found.target[:, number], value) < 1e-4


def test_a_group_shares_one_shift_against_the_mean_loss():
    lm = tiny_lm("llama")
    lm.model.double()
    contexts, options = sample_contexts(lm, PREFIXES), ValueConfig(steps=8, clamp_norm_factor=2.0)
    found = optimize_values(lm, REQUESTS, 1, "block", options, contexts, [[0, 3], [1], [2]])
    for number, members in enumerate([[0, 3], [1], [2]]):
        value, steps, loss = plain_value(lm, [REQUESTS[i] for i in members], 1, "block", options, contexts)
        assert relative(found.target[:, number], value) < 1e-6
        assert (found.steps[number], found.losses[number]) == (steps, pytest.approx(loss, rel=1e-6))


@pytest.mark.parametrize(
    ("family", "ending"),
    [
        ("gpt2", "attn.c_proj"),
        ("gptj", "attn.out_proj"),
        ("llama", "self_attn.o_proj"),
        ("gpt_neox", "attention.dense"),
    ],
)
def test_the_attentions_output_projection_is_found(family, ending):
    lm = tiny_lm(family)
    assert attention_out(lm.model, lm.layout, 1) == f"{lm.layout.block(1)}.{ending}"


# --- models that normalize or scale what an MLP writes ---------------------------------------------------------------

QUICK = ValueConfig(steps=5, clamp_norm_factor=2.0)
PREFIX = ContextConfig(prefixes=["The city"])


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "olmo2", "granite"])
def test_where_writes_are_not_additive_each_layer_has_targets_at_its_own_projection(family):
    """Not the last layer: what it writes at a subject's token never reaches the answer's, so its gradient is noise."""
    lm, wanted, layers = tiny_lm(family), REQUESTS[:2], [0, 1]
    editor = prepared(MEMIT, layers=layers, use_covariance=False, covariance_weight=5.0, value=QUICK, context=PREFIX)
    edit = editor.edit(lm, wanted)
    contexts = editor.on(lm).contexts

    def targets(layer: int) -> torch.Tensor:
        return torch.stack([plain_value(lm, fact, layer, "mlp_out", QUICK, contexts)[0] for fact in wanted], dim=1)

    unit = {layer: torch.eye(lm.key_width(layer), dtype=torch.float64) for layer in layers}
    expected = plain_update(lm, wanted, layers, targets, contexts, unit, 5.0)
    assert edit.updates.keys() == expected.keys() and len(expected) == len(layers)
    for name, update in expected.items():
        assert relative(edit.stored(lm, name).double(), update) < 2e-3, name
    assert len(edit.info["losses"]) == len(wanted) * len(layers)


@pytest.mark.parametrize(
    ("family", "method"),
    [(family, MEMIT) for family in NOT_ADDITIVE]
    + [("gemma3_text", other) for other in (EMMET, PMET, BLUE, MEMITMerge)],
)
def test_every_member_writes_what_the_last_projection_should_put_out(family, method):
    lm, wanted = tiny_lm(family), REQUESTS[:2]
    editor = prepared(
        method, layers=[0, 1], use_covariance=False, covariance_weight=1e-6, value=QUICK,
        context=ContextConfig(prefixes=[]),
    )  # fmt: skip
    before = snapshot(lm)
    edit = editor.edit(lm, wanted)
    assert same_bits(before, snapshot(lm)) and len(edit.updates) == 2
    (_, site), contexts = editor.on(lm).aims([1])[0], editor.on(lm).contexts
    first, _ = sorted(edit.updates)
    with lm.edited(WeightDelta({first: edit.updates[first]})):
        values = optimize_values(lm, wanted, 1, site, QUICK, contexts)
    with lm.edited(edit):
        found = Subjects(lm, wanted, contexts).states(1, 1, site)
    assert relative(found, values.target) < 1e-3 < relative(values.initial, values.target)


def test_what_cannot_be_aimed_at_is_refused_before_statistics(monkeypatch):
    """PMET moves attention, which the first layer of this model has not; where writes add up, it asks the last only."""
    lm = tiny_lm("lfm2")
    asked: list[list[int]] = []
    monkeypatch.setattr(MomentStore, "collect", lambda self, lm, layers: asked.append(layers))
    with pytest.raises(UsageError, match="no attention output projection found in layer 0"):
        prepared(PMET, layers=[0]).warm_up(lm)
    assert not asked
    prepared(PMET, layers=[0, 1]).warm_up(lm)
    assert asked == [[0, 1]]


# --- methods
# -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", ["[2]", "[0,1,2,3,4]"])
@pytest.mark.parametrize("name", ["memit", "emmet"])
def test_one_layer_or_five(name, layers, editor, lm):
    edit = editor(name, f"method.layers={layers}", "method.covariance_weight=20").edit(lm, requests(3))
    assert len(edit.updates) == len(edit.info["residual_norms"]) == len(layers) // 2
    with lm.edited(edit):
        assert hits(lm, requests(3)) == 3


def test_blue_writes_the_first_and_the_last_layer_each_towards_its_own_targets(editor, lm):
    wanted = requests(3)
    edit = editor("blue").edit(lm, wanted)
    first = editor("memit", "method.layers=[0]").edit(lm, wanted)
    with lm.edited(first):
        last = editor("memit", "method.layers=[3]").edit(lm, wanted)
    expected = first.updates | last.updates
    assert edit.info["steps"] == first.info["steps"] + last.info["steps"] and len(edit.info["steps"]) == 2 * 3
    assert edit.info["losses"] == pytest.approx(first.info["losses"] + last.info["losses"], rel=1e-3)
    assert edit.info["diagnosis"]["values"] == 2 * 3
    reached = [part.info["diagnosis"]["reached"] for part in (first, last)]
    assert edit.info["diagnosis"]["reached"] == sum(reached)
    assert edit.updates.keys() == expected.keys() and len(expected) == 2
    for name, factors in edit.updates.items():
        assert relative(factors.dense(), expected[name].dense()) < 1e-4


@pytest.mark.parametrize("name", ["rome", "r-rome"])
def test_rome_tells_of_every_fact_and_layer(name, editor, lm):
    """As many losses, steps and gains as there are updates: one by one they are the same."""
    made, wanted, alone = editor(name, "method.layers=[1,2]"), requests(2), []
    together = made.edit(lm, wanted).info
    for request in wanted:
        lm.attach(made.edit(lm, [request]))
        alone.append(lm.attached[-1].info)
    for _ in wanted:
        lm.detach()
    for key in ("losses", "steps", "gains"):
        assert len(together[key]) == 4
        assert together[key] == pytest.approx([value for info in alone for value in info[key]], rel=1e-3)
    assert all(0 < gain <= 1 + 1e-9 for gain in together["gains"])
    assert together["prefixes"] == alone[0]["prefixes"]


def test_merge_meets_several_facts_about_one_subject(editor, lm, monkeypatch):
    notes: list[str] = []
    monkeypatch.setattr(lm.monitor, "note", notes.append)
    single = [case.requests[0] for case in world("tune")]
    by_subject: dict[str | None, list[EditRequest]] = {}
    for request in single:
        by_subject.setdefault(request.subject, []).append(request)
    first_in_prompt = ([fact for fact in facts if fact.prompt.startswith("{}")] for facts in by_subject.values())
    same = [facts[:2] for facts in first_in_prompt if len(facts) > 1]
    wanted = [fact for facts in same[:4] for fact in facts]
    assert len(wanted) == 8
    merged = editor("memit-merge").edit(lm, wanted)
    assert merged.info["groups"] == 4 and any("8 facts are about 4 subjects" in note for note in notes)
    assert not any("same key" in note for note in notes)
    plain = editor("memit").edit(lm, wanted)
    assert plain.info["groups"] == 8 and any("same key" in note and "memit-merge" in note for note in notes)
    found = []
    for edit in (plain, merged):
        with lm.edited(edit):
            found.append(hits(lm, wanted))
    assert found[1] == 8 > found[0]


def test_merge_without_a_conflict_is_memit(editor, lm):
    first, second = (editor(name).edit(lm, requests(3)).state()[0] for name in ("memit", "memit-merge"))
    assert same_bits(first, second)


def test_pmet_reads_its_residual_at_the_projection(editor, lm):
    """Writes of lower layers do not appear in the projection's output, so the residual hardly shrinks: published as
    such.
    """
    edit = editor("pmet").edit(lm, requests(3))
    norms = list(edit.info["residual_norms"].values())
    assert norms[-1] > 0.5 * norms[0]
    norms = list(editor("memit").edit(lm, requests(3)).info["residual_norms"].values())
    assert norms[-1] < 0.5 * norms[0]


def test_alphaedit_reports_its_null_spaces(editor, lm):
    edit = editor("alphaedit").edit(lm, requests(2))
    assert set(edit.info["nullspace"]) == {"0", "1", "2", "3"}
    assert all(0 < rank < width == 512 for rank, width in edit.info["nullspace"].values())


def test_ultraedit_is_a_ridge_regression_on_normalized_gradients(lm):
    """Against autograd of the plain model, without probes."""
    wanted = [EditRequest(request.text, None, request.target_new) for request in requests(5)]
    config = ["method.modules=[mlp_out:4,mlp.c_fc:5]", "method.lr=1e-3", "method.chunk=5", "method.begin_with=0"]
    register_resolvers()
    with initialize_config_module("edit_cli.conf", version_base="1.3"):
        edit = Prepared(method_of(compose("evaluate", ["method=ultraedit", *config]).method)).edit(lm, wanted)
    names = ["transformer.h.4.mlp.c_proj", "transformer.h.5.mlp.c_fc"]
    rows = lm.head.encode([(request.text, request.target_new) for request in wanted])
    seen: dict[str, list[Any]] = {name: [] for name in names}
    loss, count = torch.zeros(()), sum(len(row.target) for row in rows)

    def keep(name):
        def hook(_, args, output):
            seen[name].append((args[0][0], output.requires_grad_() if output.is_leaf else output))
            output.retain_grad()

        return hook

    embedding = lm.model.get_input_embeddings().register_forward_hook(
        lambda _, __, output: output.detach().requires_grad_()
    )
    handles = [embedding, *(lm.module(name).register_forward_hook(keep(name)) for name in names)]
    for row in rows:
        logits = lm.model(input_ids=torch.tensor([row.ids])).logits[0, row.start - 1 : -1]
        loss = loss + torch.nn.functional.cross_entropy(logits, torch.tensor(row.target), reduction="sum") / count
    loss.backward()
    for handle in handles:
        handle.remove()
    for name in names:
        at = [slice(row.start - 1, len(row.ids) - 1) for row in rows]
        x = torch.cat([inputs[where] for (inputs, _), where in zip(seen[name], at, strict=True)]).detach().double()
        g = torch.cat([output.grad[0, where] for (_, output), where in zip(seen[name], at, strict=True)]).double()
        both = torch.cat([x, g], dim=1)
        deviation = (len(x) * both.var(0) / (len(x) - 1)).sqrt()
        normal = (both - both.mean(0)) / (deviation + torch.finfo(torch.float32).eps)
        v = -1e-3 * normal[:, : x.shape[1]].square().sum(1, keepdim=True) * normal[:, x.shape[1] :]
        expected = torch.linalg.solve(x.T @ x + torch.eye(x.shape[1], dtype=torch.float64), x.T @ v)
        assert relative(edit.stored(lm, f"{name}.weight").double(), expected) < 1e-3  # Conv1D stores (d_in, d_out)


def test_ultraedit_needs_no_subject_but_more_than_one_token(editor, lm):
    ultraedit = editor("ultraedit", "method.begin_with=0")
    wanted = [EditRequest(request.text, None, request.target_new) for request in requests(6)]
    ultraedit.check(lm, wanted[0])
    with lm.edited(ultraedit.edit(lm, wanted)):
        assert hits(lm, wanted) >= 3
    with pytest.raises(UsageError, match="protocol.batch_size"):
        editor("ultraedit", "method.modules=[mlp_out:4]", "method.begin_with=0").edit(lm, wanted[:1])


def records(split: str) -> list[tuple[str, str]]:
    assert split == "train"
    return [(case.requests[0].text, case.requests[0].target_true or "") for case in world("test")[:40]]


def test_ultraedit_writes_a_single_fact_once_its_moments_have_seen_others(editor, lm):
    """Records of the training split are read, each with the answer of the next, and nothing of them is written."""
    untouched, told = snapshot(lm), records("train")
    for request in requests(2):
        made = editor("ultraedit")
        made.examples = records
        edit = made.edit(lm, [request])
        assert same_bits(snapshot(lm), untouched)
        with lm.edited(edit):
            assert hits(lm, [request]) == 1
            others = [(first[0], second[1]) for first, second in pairwise(told)]
            assert sum(all(score.hits) for score in lm.loglikelihood(others[:19])) <= 1
    with lm.edited(editor("ultraedit", "method.begin_with=0").edit(lm, requests(1))):
        assert hits(lm, requests(1)) == 0  # as published


def test_ultraedit_begins_with_others_only_where_a_first_turn_lacks_facts(editor, lm):
    wanted = requests(24)

    def begun():
        made = editor("ultraedit")
        made.examples = records
        return made

    first, second = begun(), editor("ultraedit", "method.begin_with=0")
    # enough facts: as published, and a later turn goes on from them however few it has
    assert same_bits(first.edit(lm, wanted[:20]).state()[0], second.edit(lm, wanted[:20]).state()[0])
    assert same_bits(first.edit(lm, wanted[20:21]).state()[0], second.edit(lm, wanted[20:21]).state()[0])
    first.reset()
    assert same_bits(first.edit(lm, wanted[:1]).state()[0], begun().edit(lm, wanted[:1]).state()[0])
    names = first.on(lm)._names()
    plain = begun().on(lm)._warmed(names, 1)
    with lm.edited(editor("ft").edit(lm, wanted[1:3])):  # it is the unedited model that is read
        read = begun().on(lm)._warmed(names, 1)
    assert plain and all(torch.equal(read[shape].mean, plain[shape].mean) for shape in plain)


def test_ultraedit_says_what_a_few_facts_need(editor, lm):
    with pytest.raises(UsageError) as caught:
        editor("ultraedit").edit(lm, requests(1))
    assert all(part in str(caught.value) for part in ("edit 20 at once", "protocol.batch_size", "method.begin_with=0"))


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ("[]", "method.modules is empty"),
        ("[mlp_out]", "'mlp_out' is no name and layers"),
        ("[mlp.x:1]", "no Linear or Conv1D"),
        ("[mlp_out:3-9]", "layer 6 does not exist"),
    ],
)
def test_ultraedit_refuses_modules_that_are_not_there(modules, message, editor, lm):
    with pytest.raises(UsageError, match=message):
        editor("ultraedit", f"method.modules={modules}").edit(lm, requests(2))


# --- options that compose
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILY)
def test_every_member_takes_all_options_at_once(name, editor, lm):
    options = ["method.rect=0.5", "method.prune=1.5", "method.norm_weight=0.01", "method.value.mpes=2"]
    wanted, untouched = requests(2), snapshot(lm)
    before = [score.nll for score in lm.loglikelihood([(r.text, r.target_new) for r in wanted])]
    edit = editor(name, *options).edit(lm, wanted)
    assert same_bits(snapshot(lm), untouched)
    for update in edit.updates.values():
        assert 0.45 < float((update != 0).float().mean()) <= 0.5 + 1e-4
    with lm.edited(edit):
        after = [score.nll for score in lm.loglikelihood([(r.text, r.target_new) for r in wanted])]
    assert all(new < old for new, old in zip(after, before, strict=True))
    assert editor(name).edit(lm, wanted).norms() != edit.norms()


def test_the_norm_constraint_makes_updates_smaller(editor, lm):
    norms = [
        sum(editor("memit", f"method.norm_weight={weight}").edit(lm, requests(3)).norms().values())
        for weight in (0.0, 1.0, 20.0)
    ]
    assert norms == sorted(norms, reverse=True) and norms[-1] < 0.9 * norms[0]


# --- sequences
# -----------------------------------------------------------------------------------------------------------

SEQUENCES = {
    "alphaedit": [],
    "memit": ["method.past_keys=write"],
    "emmet": ["method.past_keys=post"],
    "ultraedit": ["method.begin_with=0"],
    "rome": [],
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_a_resumed_sequence_is_the_uninterrupted_one_bit_for_bit(name, editor, tmp_path):
    lm, overrides = embedded_lm(), SEQUENCES[name]
    batches = [requests(2, start=2 * number) for number in range(3)]
    whole, expected = editor(name, *overrides), []
    for number, batch in enumerate(batches):
        expected.append(whole.edit(lm, batch))
        edit_store.save(expected[-1], tmp_path / str(number), lm, batch, {"name": name})
        lm.attach(expected[-1])
    final = snapshot(lm)
    for _ in batches:
        lm.detach()
    again = editor(name, *overrides)
    for number in range(2):
        edit = edit_store.load(tmp_path / str(number), lm)
        again.recall(lm, edit)
        lm.attach(edit)
    last = again.edit(lm, batches[2])
    assert same_bits(last.state()[0], expected[2].state()[0])
    lm.attach(last)
    assert same_bits(snapshot(lm), final)


@pytest.mark.parametrize("name", ["alphaedit", "ultraedit"])
def test_what_earlier_edits_left_matters_and_reset_forgets_it(name, editor, lm):
    keeping = editor(name, *SEQUENCES[name])
    first = keeping.edit(lm, requests(2)).state()[0]
    drifted = keeping.edit(lm, requests(2)).state()[0]
    keeping.reset()
    again = keeping.edit(lm, requests(2)).state()[0]
    assert not same_bits(first, drifted)
    assert same_bits(first, again)


def test_memory_is_no_part_of_the_weights(editor, lm):
    edit = editor("alphaedit").edit(lm, requests(2))
    assert sorted(edit.memory) == [f"keys.{layer}" for layer in range(4)] and edit.memory["keys.0"].shape == (512, 2)
    assert sorted(edit.updates) == edit.touches(lm)
    assert editor("memit").edit(lm, requests(2)).memory == {}


def test_kept_keys_keep_their_values(editor):
    """An edit moves what earlier edits wrote less if it was told to keep their keys."""
    lm = embedded_lm()
    moved = {}
    for past in ("none", "write"):
        memit = editor("memit", f"method.past_keys={past}", "method.covariance_weight=5")
        first = memit.edit(lm, requests(10))
        lm.attach(first)
        second = memit.edit(lm, requests(10, start=10))
        lm.detach()
        keys = (
            editor("memit", "method.past_keys=write", "method.covariance_weight=5")
            .edit(lm, requests(10))
            .memory["keys.0"]
        )
        moved[past] = float((second.updates["transformer.h.0.mlp.c_proj.weight"].dense() @ keys).norm())
    assert moved["write"] < 0.7 * moved["none"]
