"""`inspect`: memories of feed-forward layers, against plain loops over single prefixes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import exact
from embedded import embedded_lm, linear_twin, requests
from families import tiny_lm

from edit_cli.edits import store as edit_store
from edit_cli.edits.edit import Factors, WeightDelta
from edit_cli.errors import MissingError, UsageError
from edit_cli.inspection.analysis import Inspection
from edit_cli.inspection.changes import changes, line_of
from edit_cli.inspection.layers import Tops, active, composition, measured, refinement, settled, values_of
from edit_cli.inspection.patterns import pattern
from edit_cli.inspection.prefixes import Prefix, Prefixes, Sample
from edit_cli.inspection.settings import InspectOptions
from edit_cli.inspection.triggers import Strongest
from edit_cli.inspection.vocabulary import Vocabulary
from edit_cli.lm.reading import HookPoint, read
from edit_cli.lm.tokenization import Row
from edit_cli.statistics.corpora import TextFile

TEXT = (
    "The faith of Hallo Jarinsson is Sikhism. The faith of Zanros Thalelberg is French.\n"
    "The boss of Quinder Velingard runs the court.\n"
    "There is a table behind the small garden. There is a bridge behind the strange garden.\n"
    "The boss of Quinder Velingard runs the army.\n"
)
LAYERS, EXAMPLES = [1, 4], 5


@pytest.fixture(scope="module")
def lm():
    return embedded_lm()


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "texts.txt"
    file.write_text(TEXT)
    return InspectOptions(
        layers=LAYERS, keys=4, examples=EXAMPLES, ablated=2, measured=8, shown=3, batch_tokens=64,
        corpus=TextFile(str(file)),
    )  # fmt: skip


@pytest.fixture(scope="module")
def lines(lm, options):
    return list(Inspection(lm, options).lines())


@torch.no_grad()
def alone(lm, ids, *modules):
    """What enters these modules at the last of these tokens, run by itself, without anything of edit-cli's."""
    seen = {}
    handles = [
        lm.module(name).register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0][0, -1]}))
        for name in modules
    ]
    lm.model(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return [seen[name].reshape(-1) for name in modules]


@pytest.fixture(scope="module")
def plain(lm):
    """{prefix: (next token, coefficients by layer)} of every prefix of two tokens or more, one by one."""
    found = {}
    sentences = [part.rstrip(".") + "." for line in TEXT.splitlines() for part in line.split(". ")]
    modules = [f"transformer.h.{layer}.mlp.c_proj" for layer in LAYERS]
    for sentence in sentences:
        ids = lm.tokenizer(sentence)["input_ids"]
        for end in range(2, len(ids) + 1):
            if tuple(ids[:end]) not in found:
                found[tuple(ids[:end])] = dict(zip(LAYERS, alone(lm, ids[:end], *modules), strict=True))
    return found


def test_triggers_are_those_of_a_plain_loop(lm, lines, plain):
    for line in (line for line in lines if line["what"] == "key"):
        scores = {prefix: by_layer[line["layer"]][line["key"]].item() for prefix, by_layer in plain.items()}
        expected = sorted(scores.items(), key=lambda item: -item[1])[:EXAMPLES]
        told = line["examples"]
        assert [one["coefficient"] for one in told] == pytest.approx(
            [score for _, score in expected if score > 0], abs=1e-5
        )
        near = {lm.tokenizer.decode(prefix) for prefix, score in scores.items() if score > expected[-1][1] - 1e-5}
        assert {one["text"] for one in told} <= near and len({one["text"] for one in told}) == len(told)
    assert sum(line["what"] == "key" for line in lines) == 8


def test_agreement_is_that_of_a_plain_loop(lm, lines, plain):
    """A prefix that two sentences begin with goes on as in the one that was read first: either may be."""
    following: dict[tuple[int, ...], set[int]] = {}
    for prefix in plain:
        following.setdefault(prefix[:-1], set()).add(prefix[-1])
    embedding = lm.model.transformer.wte.weight
    for line in (line for line in lines if line["what"] == "layer"):
        values = lm.model.transformer.h[line["layer"]].mlp.c_proj.weight  # (keys, width)
        agree = compared = 0
        for key in range(len(values)):
            best = max(plain, key=lambda prefix: plain[prefix][line["layer"]][key].item())
            if plain[best][line["layer"]][key] > 0 and best in following:
                compared += 1
                agree += int((embedding @ values[key]).argmax()) in following[best]
        assert (line["keys"], line["compared"]) == (len(values), compared)
        assert line["agreement"] == pytest.approx(agree / compared, abs=1.5 / compared)
        assert 0 <= line["chance"] < 0.05


@pytest.mark.parametrize("make", [embedded_lm, linear_twin, lambda: tiny_lm("llama"), lambda: tiny_lm("gemma3_text")])
def test_a_layers_output_is_the_sum_of_its_memories(make):
    model = make()
    module = model.layout.mlp_out(1)
    rows, points = [Row((5, 6, 7), 3, ())], [HookPoint(module, "input"), HookPoint(module, "output")]
    coefficients, output = read(model, rows, [2], points)
    bias = getattr(model.module(module), "bias", None)
    expected = coefficients @ values_of(model, 1) + (0 if bias is None else bias)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def test_what_the_residual_holds_before_a_layer(lm):
    """Of GPT-2's blocks: what entered, and what attention added to it."""
    ids = tuple(lm.tokenizer("The boss of Quinder Velingard runs")["input_ids"])
    with torch.no_grad():
        (state,) = (lm.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[2],)
        block = lm.model.transformer.h[2]
        attended = state + block.attn(block.ln_1(state))[0]
        expected = (lm.model.transformer.wte.weight @ attended[0, -1]).argmax()
    vocabulary = Vocabulary(lm)
    tops = {2: vocabulary.tops(values_of(lm, 2))}
    (found,) = measured(lm, [2], [Prefix((), ids, None, 0)], tops, vocabulary)
    assert found.residual.tolist() == [int(expected)]
    assert sum(found.refinement.values()) == pytest.approx(1.0)


def test_active_memories_and_whose_token_wins():
    norms, tops = torch.ones(4), Tops(torch.tensor([7, 8, 9, 7]), torch.tensor([1, 2, 3, 4]), torch.ones(4))
    mixed = torch.tensor([[6.0, -3.5, 0.3, 0.2], [0.1, 0.1, -9.8, 0.0]])
    assert active(mixed, norms).tolist() == [[True, True, False, False], [False, False, True, False]]
    assert active(mixed.clamp(min=0), norms).tolist() == [[True, False, True, True], [True, True, False, False]]
    # −v of memory 1 promotes 2, −v of memory 2 promotes 3
    assert composition(mixed, norms, tops, torch.tensor([2, 3])) == {"active": 0.375, "alone": 1.0}
    assert composition(mixed, norms, tops, torch.tensor([8, 9]))["alone"] == 0.0
    shares = refinement(torch.tensor([1, 1, 1, 1]), torch.tensor([1, 2, 2, 2]), torch.tensor([1, 1, 2, 3]))
    assert shares == {"agreement": 0.25, "residual": 0.25, "layer": 0.25, "composition": 0.25}
    course = settled([torch.tensor([5, 0]), torch.tensor([4, 6]), torch.tensor([5, 6])], torch.tensor([5, 6]))
    assert course == [{"final": 0.5, "settled": 0.0}, {"final": 0.5, "settled": 0.5}, {"final": 1.0, "settled": 1.0}]


def test_equal_scores_go_to_the_earlier_place():
    for size in (1, 2):
        found = Strongest(1, size)
        found.see(torch.tensor([[1.0], [3.0], [3.0]]), torch.tensor([4, 7, 9]))
        found.see(torch.tensor([[3.0], [2.0]]), torch.tensor([1, 2]))
        assert found.places.tolist() == [[1, 7][:size]] and found.scores.tolist() == [[3.0, 3.0][:size]]


def test_a_prefix_that_sentences_share_counts_once_and_samples_are_even(lm, options):
    prefixes = Prefixes(lm, options, None)
    places = [place for chunk in prefixes.chunks(1) for place in (s.number for s in chunk for _ in s.fresh)]
    assert len(places) == prefixes.count and prefixes.documents == 4
    sample = Sample(3, seed=1)
    sample.see(list(range(10)))
    sample.see(list(range(10, 20)))
    assert len(set(sample.places)) == 3 and set(sample.places) <= set(range(20))
    counts = torch.zeros(6)
    for seed in range(600):
        one = Sample(2, seed)
        one.see(list(range(6)))
        counts[one.places] += 1
    assert counts.min() > 150 and counts.max() < 250  # 200 each


def test_patterns_are_told_by_ends_and_by_words():
    words = "a river name of b c d e".split()

    def prefix(text, document=0):
        return Prefix((), tuple(map(words.index, text.split())), 0, document)

    def decode(ids):
        return " ".join(words[token] for token in ids)

    ends = [prefix(f"a river {word} of", number) for number, word in enumerate("bcd")]
    assert pattern(ends, decode, {})["kind"] == "shallow" and pattern(ends, decode, {})["last"] == ["of", 1.0]
    theme = [prefix(f"river b {word}") for word in "cde"]
    told = pattern(theme, decode, {})
    assert (told["kind"], told["words"], told["documents"]) == ("semantic", [["river", 1.0]], 1 / 3)
    assert pattern(theme, decode, {"river": 0.5})["kind"] == "none"


def test_tokens_that_are_removed_change_the_coefficient_as_a_plain_pass_says(lm, lines):
    line = next(line for line in lines if line["what"] == "key" and len(line["examples"]) >= 2)
    module = f"transformer.h.{line['layer']}.mlp.c_proj"
    for which, cut in (("first", slice(1, None)), ("last", slice(None, -1))):
        changed = []
        for one in line["examples"][:2]:
            ids = lm.tokenizer(one["text"])["input_ids"]
            before, after = (alone(lm, part, module)[0][line["key"]].item() for part in (ids, ids[cut]))
            changed.append((after - before) / abs(before))
        assert line["removed"][which] == pytest.approx(sum(changed) / 2, abs=1e-3)


def test_what_an_edit_changed(lm, tmp_path):
    """A value slot of one key that fires at the subject is moved along one token's embedding."""
    (fact,) = requests(1)
    layer, module = 3, lm.layout.mlp_out(3)
    (row,) = lm.head.encode([(fact.text, None)])
    position = row.token_at(fact.subject_span[1] - 1)
    (keys,) = read(lm, [row], [position], [HookPoint(module, "input")])
    fired, token = int(keys[0].argmax()), lm.tokenizer(" organ")["input_ids"][0]
    right = torch.zeros(1, lm.key_width(layer))
    right[0, fired] = 1.0
    left = 5 * lm.model.transformer.wte.weight[token][:, None]
    edit = WeightDelta({f"{module}.weight": Factors(left, right)})
    edit_store.save(edit, tmp_path / "edit", lm, [fact], {})
    facts, (change,), others = changes(lm, [tmp_path / "edit"], "edit", 5)
    assert not lm.attached and others == [] and change.layer == layer
    line = line_of(lm, change, facts, Vocabulary(lm), 3, [[("text", 1.0)]])
    assert [one["key"] for one in line["values"]] == [fired]
    assert line["values"][0]["after"][0][0] == " organ" == line["facts"][0]["change_promotes"][0][0]
    assert line["facts"][0]["fired"][0]["before"] == line["facts"][0]["fired"][0]["after"]  # nothing below has changed
    assert line["factors"][0]["tokens"][0][0] == " organ"
    # the first fact's key lies along the right factor, whichever sign it was saved with
    minus = replace(edit, updates={f"{module}.weight": Factors(-left, -right)})
    edit_store.save(minus, tmp_path / "minus", lm, [fact], {})
    _, (turned,), _ = changes(lm, [tmp_path / "minus"], "minus", 5)
    torch.testing.assert_close(turned.right, change.right)


COMMAND = (
    "inspect", "corpus=file", "corpus.path=text.txt", "protocol.layers=[2,5]", "protocol.keys=3", "protocol.examples=4",
    "protocol.measured=6", "run_dir=run", "model.device=cpu",
)  # fmt: skip


def test_the_command_from_end_to_end(cli, lm):
    Path("text.txt").write_text(TEXT)
    fact = replace(requests(1)[0], target_new="or\x1b[2Jgan<script>alert(1)</script>")
    name = f"{lm.layout.mlp_out(2)}.weight"
    width = lm.key_width(2)
    edit = WeightDelta({name: Factors(torch.ones(lm.layout.width, 1), torch.ones(1, width) / width)})
    edit_store.save(edit, Path("edit"), lm, [fact], {})
    ended = cli(*COMMAND, "edit=edit")
    assert ended.code == 0 and ended.out.startswith("Memories of tiny-gpt2: 6 keys looked at"), ended.err
    assert f"{fact.subject}" in ended.words and "page: run/report.html" in ended.out
    page = Path("run/report.html").read_text()
    assert "<script>alert" not in page
    assert "\x1b" not in page and "\\x1b" in page
    assert {"memories.png", "memories.svg", "summary.json"} <= {file.name for file in Path("run").iterdir()}
    assert cli("show", "run").out.startswith("Memories of tiny-gpt2")
    summary = json.loads(Path("run/summary.json").read_text())
    summary["layers"][0]["agreement"] = "much"
    Path("run/summary.json").write_text(json.dumps(summary))
    damaged = cli("show", "run")
    assert damaged.code == 3 and "agreement" in damaged.error


@pytest.mark.slow
def test_a_killed_inspection_goes_on_to_the_same_lines(cli):
    Path("text.txt").write_text(TEXT)
    words = (*COMMAND, "report=false", "figures=false")
    assert cli(*words).code == 0
    first, whole = exact(Path("run")), Path("run/results.jsonl").read_text().splitlines(keepends=True)
    # killed after some lines: the missing ones are the same bits
    Path("run/results.jsonl").write_text("".join(whole[:3]))
    Path("run/summary.json").unlink()
    assert cli(*words).code == 0 and exact(Path("run")) == first
    again = cli(*words)
    assert again.code == 0 and "inspected already" in again.err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [6]}, "protocol.layers: layer 6 does not exist, this model has layers 0 to 5"),
        ({"named": ["9:1"]}, "protocol.named: layer 9 does not exist"),
        ({"named": ["1:999"]}, "layer 1 has keys 0 to 511, no key 999"),
        ({"named": ["first"]}, "name a key as LAYER:KEY, such as 3:17"),
        ({"layers": [1], "named": ["2:3"]}, "layer 2 is not among protocol.layers=[1]"),
        ({"keys": 513}, "layer 0 has only 512 keys"),
        ({"keys": 1, "examples": 9999}, "to choose from; lower it, raise limit"),
    ],
)
def test_memories_that_there_are_not(lm, options, settings, message):
    with pytest.raises(UsageError) as caught:
        next(Inspection(lm, replace(options, **{"layers": None} | settings)).lines())
    assert message in str(caught.value)


def test_a_text_that_is_too_short(lm, options):
    with pytest.raises(MissingError, match="no sentence of 99 tokens"):
        next(Inspection(lm, replace(options, shortest=99)).lines())


def test_edits_that_cannot_be_told(lm, tmp_path):
    names = {"others": f"{lm.layout.mlp_out(0)}.weight", "norms": "transformer.h.0.ln_1.weight",
             "attention": "transformer.h.0.attn.c_proj.weight"}  # fmt: skip
    for place, name in names.items():
        edit, touched = WeightDelta({name: torch.zeros(lm.parameter(name).shape)}), {name: "0" * 64}
        edit_store.save(edit, tmp_path / place, lm, requests(1), {}, touched=touched if place == "others" else None)
    with pytest.raises(MissingError, match="was made for other weights"):
        changes(lm, [tmp_path / "others"], "others", 5)
    with pytest.raises(UsageError, match="edit=norms cannot be told as values of memories: it changes transformer"):
        changes(lm, [tmp_path / "norms"], "norms", 5)
    with pytest.raises(UsageError, match="moves no value of a memory"):
        changes(lm, [tmp_path / "attention"], "attention", 5)
    assert not lm.attached


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("protocol.layers=[6]",), 2, "protocol.layers: layer 6 does not exist, this model has layers 0 to 5"),
        (("corpus=file", "corpus.path=no.txt"), 3, "corpus.path=no.txt cannot be read"),
        (("edit=nowhere",), 3, "nowhere is no edit directory"),
    ],
)
def test_bad_input_is_told_in_a_line_before_a_model_is_loaded(cli, words, code, message):
    ended = cli("inspect", "run_dir=run", *words)
    assert (ended.code, message in ended.error) == (code, True), ended.err
