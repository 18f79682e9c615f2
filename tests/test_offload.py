"""A model larger than its devices: half of its weights lie in host memory or on disk, and everything is as if they
did not.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from conftest import json_lines, observations
from embedded import METHODS, answers, embedded_lm, packaged_editor, requests, same_bits
from families import tiny
from torch import Tensor

from edit_cli.edits import store as edit_store
from edit_cli.edits.edit import WeightDelta
from edit_cli.errors import UsageError
from edit_cli.lm.loading import ModelOptions
from edit_cli.lm.model import LM
from edit_cli.lm.weights.offload import fetch_again_for_backward, offloading_hook
from edit_cli.requests import EditRequest

pytestmark = pytest.mark.thin(3)

PARTS = [
    "transformer.wte",
    "transformer.wpe",
    *(f"transformer.h.{layer}" for layer in range(6)),
    "transformer.ln_f",
    "lm_head",
]
ON_DISK = {f"transformer.h.{layer}" for layer in (0, 2, 5)} | {"transformer.ln_f"}
HALF = {part: "disk" if part in ON_DISK else "cpu" for part in PARTS}


def half_on_disk(**more) -> LM:
    return ModelOptions("tiny-gpt2", "embedded:tiny-gpt2", device_map=HALF, **more).load()


def all_in_host_memory() -> LM:
    """As beside a GPU that holds one module at a time: even the embeddings are brought and taken away."""
    plain = embedded_lm()
    cpu_offload(plain.model, torch.device("cpu"))
    fetch_again_for_backward(plain.model)
    return LM(plain.model, plain.tokenizer, plain.name, model_id=plain.id)


OFFLOADED = {"disk": half_on_disk, "host": all_in_host_memory}


@cache
def model(kind: str) -> LM:
    return {"plain": embedded_lm, **OFFLOADED}[kind]()


def values(lm: LM) -> dict[str, Tensor]:
    """A copy of every weight, wherever it is."""
    return {name: lm.access(name).value().clone() for name, _ in embedded_names(lm)}


def embedded_names(lm: LM):
    return [(name, parameter) for name, parameter in lm.model.named_parameters() if name != "lm_head.weight"]


def nothing_was_left_on_the_device(lm: LM) -> bool:
    return all(
        parameter.is_meta
        for module in lm.model.modules()
        if offloading_hook(module)
        for parameter in module.parameters(recurse=False)
    )


FEW = (("disk", "memit"), ("disk", "lookup"), ("host", "ft"))  # the others take minutes


@pytest.mark.parametrize("kind", OFFLOADED)
def test_the_weights_are_away_and_can_be_read_all_the_same(kind):
    lm, plain = model(kind), model("plain")
    away = [name for name, parameter in embedded_names(lm) if parameter.is_meta]
    assert len(away) >= 38
    assert lm.device == torch.device("cpu")
    assert lm.dtype == torch.float32
    assert same_bits(values(lm), values(plain))
    assert lm.fingerprint() == plain.fingerprint()
    for layer in range(6):
        assert torch.equal(lm.weight(lm.layout.mlp_out(layer)), plain.weight(plain.layout.mlp_out(layer)))
        assert lm.writes_are_additive(layer)
    assert answers(lm, requests(4)) == answers(plain, requests(4))
    text = ["The old lighthouse stands on the shore."]
    assert lm.token_nlls(text, 16) == plain.token_nlls(text, 16)


@pytest.mark.parametrize(
    "kind, name",
    [
        pytest.param(kind, name, marks=() if (kind, name) in FEW else pytest.mark.slow)
        for kind, names in {"disk": METHODS, "host": ("memit", "rome", "ft", "lookup")}.items()
        for name in names
    ],
)
def test_an_edit_is_the_same_bit_for_bit(kind, name, statistics, tmp_path):
    """Made, attached, saved, loaded and taken off as on a model that fits."""
    lm, plain, wanted = model(kind), model("plain"), requests(2)
    before, untouched = answers(lm, wanted), values(lm)
    expected = packaged_editor(statistics, name).edit(plain, wanted)
    edit = packaged_editor(statistics, name).edit(lm, wanted)
    assert same_bits(edit.state()[0], expected.state()[0])
    assert same_bits(values(lm), untouched)
    assert nothing_was_left_on_the_device(lm)
    edit_store.save(edit, tmp_path / "edit", lm, wanted, {"name": name})
    edit_store.save(expected, tmp_path / "plain", plain, wanted, {"name": name})
    with plain.edited(expected):
        after, weights = answers(plain, wanted), values(plain)
    assert after != before
    with lm.edited(edit):
        assert answers(lm, wanted) == after
        assert same_bits(values(lm), weights)
    edit_store.attach(tmp_path / "plain", lm)
    assert answers(lm, wanted) == after
    lm.detach()
    assert same_bits(values(lm), untouched)
    assert answers(lm, wanted) == before
    edit_store.attach(tmp_path / "edit", plain)
    assert answers(plain, wanted) == after
    plain.detach()


@pytest.mark.parametrize("kind", OFFLOADED)
def test_fine_tuning_whole_blocks(kind, statistics):
    """Norms and biases are brought for training as matrices are."""
    lm, plain, wanted = model(kind), model("plain"), requests(2)
    untouched = values(lm)
    found, expected = (
        packaged_editor(statistics, "ft", "method.part=block", "method.layers=[0,1]").edit(x, wanted)
        for x in (lm, plain)
    )
    assert len(found.updates) == 24
    for name, update in found.state()[0].items():
        assert (update - expected.state()[0][name]).norm() <= 1e-3 * expected.state()[0][name].norm(), name
    assert same_bits(values(lm), untouched)
    assert nothing_was_left_on_the_device(lm)
    lm.attach(found)
    with plain.edited(found):
        assert answers(lm, wanted) == answers(plain, wanted)
    lm.detach()
    assert same_bits(values(lm), untouched)


@pytest.mark.parametrize("kind", OFFLOADED)
def test_statistics(kind, tmp_path):
    def collected(which: str) -> Any:
        store: Any = packaged_editor(tmp_path / which, "memit").config
        return store.moments.collect(model(which), [0, 3])

    found, expected = collected(kind), collected("plain")
    assert not any(moment.cached for moment in [*found, *expected])
    for mine, its in zip(found, expected, strict=True):
        assert mine.tokens == its.tokens
        assert (mine.matrix - its.matrix).norm() <= 1e-6 * its.matrix.norm()


@pytest.mark.parametrize("kind", OFFLOADED)
def test_edits_stack_and_come_off_in_any_number(kind):
    lm, plain = model(kind), model("plain")
    draw, names = torch.Generator().manual_seed(0), [f"{lm.layout.mlp_out(layer)}.weight" for layer in (0, 1)]
    states = [values(lm)]
    edits = [
        WeightDelta({name: torch.randn(lm.access(name).shape, generator=draw) * 0.1 for name in names})
        for _ in range(3)
    ]
    for edit in edits:
        lm.attach(edit)
        states.append(values(lm))
    bias = WeightDelta({f"{lm.layout.mlp_out(0)}.bias": torch.full((128,), 1e-3)})
    for _ in range(1100):  # more than Python's limit of calls within calls
        lm.attach(bias)
    assert lm.loglikelihood([("Rome is", "old")])[0].nll != plain.loglikelihood([("Rome is", "old")])[0].nll
    for _ in range(1100):
        lm.detach()
    for state in reversed(states):
        assert same_bits(values(lm), state)
        if lm.attached:
            lm.detach()
    with pytest.raises(UsageError, match="made for another model"):
        lm.attach(WeightDelta({names[0]: edits[0].updates[names[0]], names[1]: torch.ones(3)}))
    assert same_bits(values(lm), states[0])


def test_many_small_updates_add_up_in_16_bits():
    lm, exact = half_on_disk(dtype="bfloat16"), half_on_disk()
    name = f"{lm.layout.mlp_out(2)}.weight"
    untouched = lm.access(name).value().clone()
    step = WeightDelta({name: torch.full(lm.access(name).shape, 2.0**-16)})
    for _ in range(100):
        lm.attach(step)
    assert torch.equal(lm.access(name).value(), (untouched.float() + 100 * 2.0**-16).bfloat16())
    for _ in range(100):
        lm.detach()
    assert torch.equal(lm.access(name).value(), untouched)
    assert lm.masters == {}
    assert exact.masters == {}


class Counting(Mapping):
    """A weights map that counts how often each weight was brought."""

    def __init__(self, below: Mapping[str, Tensor]) -> None:
        self.below = below
        self.asked: list[str] = []

    def __getitem__(self, name: str) -> Tensor:
        self.asked.append(name)
        return self.below[name]

    def __iter__(self):
        return iter(self.below)

    def __len__(self) -> int:
        return len(self.below)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_backward_passes_bring_weights_again_instead_of_holding_them_all(family):
    """Gradients of states are the plain model's, also with an edit attached; nothing is fetched twice where nothing
    is differentiated.
    """
    gradients = []
    for offload in (False, True):
        raw, words = tiny(family)
        if offload:
            cpu_offload(raw, torch.device("cpu"))
            fetch_again_for_backward(raw)
        lm = LM(raw, words)
        name = lm.layout.mlp_out(2)
        lm.attach(WeightDelta({f"{name}.weight": torch.full(lm.access(f"{name}.weight").shape, 0.01)}))
        if offload:
            hook = offloading_hook(lm.module(name))
            assert hook is not None
            hook.weights_map = counting = Counting(hook.weights_map)
            lm.loglikelihood([("Rome is", "old")])
            assert counting.asked.count("weight") == 1
            counting.asked.clear()
        states = lm.model.get_input_embeddings()(torch.arange(5, 25).reshape(2, 10)).detach().requires_grad_()
        loss = lm.model(inputs_embeds=states, use_cache=False).logits.square().mean()
        if offload:
            assert counting.asked.count("weight") == 1
        gradients.append(torch.autograd.grad(loss, states)[0])
        if offload:
            assert counting.asked.count("weight") == 2
    assert torch.equal(*gradients)


# --- loading
# ------------------------------------------------------------------------------------------------------------


def test_auto_leaves_on_disk_what_finds_no_memory(tmp_path):
    lm = ModelOptions(
        "m", "embedded:tiny-gpt2", device_map="auto", max_memory={"cpu": "3MB"}, offload_folder=str(tmp_path / "off")
    ).load()
    assert 0 < sum(parameter.is_meta for parameter in lm.model.parameters()) < 76
    assert lm.loglikelihood([("Rome is", "old")]) == model("plain").loglikelihood([("Rome is", "old")])


@pytest.mark.parametrize(
    "fields, told",
    [
        (
            {"device_map": {"transformer.h.0": "cpu", "transformer.h.1": "disk"}},
            "model.device_map does not work for model.id=",
        ),
        ({"device_map": {"": "abacus"}}, "model.device_map.=abacus is not available here; choose auto or cpu"),
        ({"device_map": {"": 99}}, "model.device_map.=cuda:99 is not available here"),
        (
            {"device_map": {"transformer": "cpu", "lm_head": "cpu", "nothing": "disk"}},
            "model.device_map.nothing names no module",
        ),
        ({"device_map": {"transformer": "disk", "lm_head": "cpu"}}, "model.device_map, where parts that share weights"),
        (
            {"device_map": {"": "cpu", "lm_head": "disk"}},
            "model.device_map names lm_head and all around it: name every part once",
        ),
        (
            {"device_map": {"transformer": "cpu", "transformer.h.1": "disk"}},
            "model.device_map names transformer.h.1 and",
        ),
        ({"device_map": "auto", "max_memory": {"cpu": "much"}}, "model.max_memory={cpu: much}: give bytes"),
        ({"device_map": "auto", "max_memory": {0: -1}}, "model.max_memory={0: -1}: give bytes"),
        ({"device_map": "auto", "max_memory": {"gpu": "1GB"}}, "model.max_memory={gpu: 1GB}: name devices"),
        ({"max_memory": {0: "1GB"}}, "model.max_memory says what may be used of each device"),
    ],
)
def test_maps_that_cannot_work_are_refused(fields, told):
    with pytest.raises(UsageError) as caught:
        ModelOptions("m", "embedded:tiny-gpt2", **fields).load()
    (line,) = str(caught.value).splitlines()
    assert line.startswith(told)
    assert len(line) < 300


def test_loading_says_nothing_about_what_is_on_disk(capfd):
    half_on_disk()
    assert capfd.readouterr() == ("", "")


# --- commands
# -----------------------------------------------------------------------------------------------------------

FACT = {"prompt": "{} plays the", "subject": "Jormia Stenenen", "target": "organ"}
MAP = "model.device_map={" + ",".join(f"{part}:{place}" for part, place in HALF.items()) + "}"


@pytest.mark.parametrize(
    "method", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("memit", "rome")), "lookup"]
)
def test_evaluate_gives_the_same_lines(cli, method):
    command = ("evaluate", f"method={method}", "limit=2")
    assert cli(*command, "run_dir=plain", quick=True).code == 0
    ended = cli(*command, "run_dir=half", MAP, quick=True)
    assert ended.code == 0, ended.err
    assert observations(Path("half")) == observations(Path("plain"))


@pytest.mark.slow
def test_every_other_command(cli):
    steps = ("sequential", "method=memit", "limit=2", "protocol.batch_size=1")
    for run, more in (("plain", ()), ("half", (MAP,))):
        ended = cli(*steps, f"run_dir={run}", *more, quick=True)
        assert ended.code == 0, ended.err
    assert observations(Path("half")) == observations(Path("plain"))
    for run, more in (("traced", ()), ("traced-half", (MAP,))):
        ended = cli("trace", "limit=1", f"run_dir={run}", "model.device=cpu", *more)
        assert ended.code == 0, ended.err
    keep = ("case_id", "scores", "high", "low")
    assert [[line[key] for key in keep] for line in json_lines(Path("traced-half/results.jsonl"))] == [
        [line[key] for key in keep] for line in json_lines(Path("traced/results.jsonl"))
    ]
    ended = cli("precompute-stats", "method=memit", MAP, "cache_dir=cold", "model.device=cpu", "stats.documents=40")
    assert ended.code == 0, ended.err
    assert len(list(Path("cold").rglob("layer-*.safetensors"))) == 4
    ended = cli(
        "edit",
        "method=memit",
        *(f"edit.{key}='{value}'" for key, value in FACT.items()),
        MAP,
        "run_dir=edited",
        quick=True,
    )
    assert ended.code == 0, ended.err
    ended = cli("apply", "edited", "--out", "baked")
    assert ended.code == 0, ended.err
    baked = ModelOptions("baked", "baked").load()
    wanted = [EditRequest(FACT["prompt"], FACT["subject"], FACT["target"])]
    lm = embedded_lm()
    edit_store.attach(Path("edited/edits/0000"), lm)
    assert answers(baked, wanted) == answers(lm, wanted)
