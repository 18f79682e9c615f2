"""What the shipped tiny model knows, how its tokenizer splits names, and the training command end to end."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import edit_cli
from tools.tiny_world.__main__ import main
from tools.tiny_world.from_records import make_fact_model
from tools.tiny_world.names import pool
from tools.tiny_world.precision import Muon, orthogonalized
from tools.tiny_world.sources import infer_subject
from tools.tiny_world.statements import NO_SUBJECT, Batches, Statement, Text, listing, statement, tokenize
from tools.tiny_world.train import TrainOptions, attention_masks, hidden_states, new_model, optimizers, recalled
from tools.tiny_world.world import World, make_world

ASSETS = Path(edit_cli.__file__).parent / "assets"


Shipped = tuple[Any, Any]  # model and tokenizer


@pytest.fixture(scope="module")
def shipped() -> Shipped:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = ASSETS / "tiny-gpt2"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(
        folder
    )


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(json.loads((ASSETS / "tiny-gpt2" / "manifest.json").read_text(encoding="utf-8"))["seed"])


def test_the_model_recalls_trained_and_held_out_wordings(shipped: Shipped, world: World) -> None:
    facts = random.Random(0).sample(world.facts, 300)
    for choose, least in ((lambda fact: fact.trained, 0.97), (lambda fact: fact.held_out, 0.95)):
        pairs = [(template.replace("{}", fact.subject), fact.object) for fact in facts for template in choose(fact)]
        hits = recalled(*shipped, pairs)
        assert sum(hits) / len(hits) >= least


def test_every_shipped_record_is_recalled(shipped: Shipped) -> None:
    records = json.loads((ASSETS / "world" / "records.json").read_text(encoding="utf-8"))
    rewrites = [record["requested_rewrite"] for record in random.Random(0).sample(records, 300)]
    assert all(
        recalled(*shipped, [(r["prompt"].replace("{}", r["subject"]), r["target_true"]["str"]) for r in rewrites])
    )


def test_free_running_text_gives_the_answer_and_a_full_stop(shipped, world: World) -> None:
    model, tokenizer = shipped
    for fact in random.Random(1).sample(world.facts, 20):
        ids = tokenizer(fact.trained[0].replace("{}", fact.subject), return_tensors="pt")
        text = tokenizer.decode(
            model.generate(**ids, max_new_tokens=2, do_sample=False)[0, ids["input_ids"].shape[1] :]
        )
        assert text == f" {fact.object}."


def test_every_position_of_the_context_is_trained(shipped) -> None:
    model, tokenizer = shipped
    text = (ASSETS / "world" / "corpus.txt").read_text(encoding="utf-8").replace("\n", " ")[:40000]
    ids = torch.tensor(tokenizer(text)["input_ids"])
    ids = ids[: len(ids) // 256 * 256].view(-1, 256)
    with torch.no_grad():
        log_p = model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    early, late = -log_p[:, 16:64].mean(), -log_p[:, -48:].mean()
    assert late < early + 0.6  # nats; positions that were never trained cost three and more


def test_the_tokenizer_adds_nothing_and_splits_new_names_like_known_ones(shipped, world: World) -> None:
    _, tokenizer = shipped
    assert tokenizer("The")["input_ids"] == tokenizer("The", add_special_tokens=False)["input_ids"]
    assert tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id
    for kind, names in world.name_pool.items():
        known = {fact.subject for fact in world.facts if fact.relation.kind == kind}
        new = [name for name in pool(kind, 400, random.Random(7)) if name not in names]
        pieces = [
            sum(len(tokenizer.encode(f" {name}")) for name in group) / len(group) for group in (known, new or known)
        ]
        assert abs(pieces[0] - pieces[1]) < 0.25, kind
    assert all(len(tokenizer.encode(f" {fact.object}")) == 1 for fact in world.facts)


def test_masks_leave_only_the_last_token_of_a_subject_visible_and_only_from_the_bottleneck_on() -> None:
    left = torch.tensor([[NO_SUBJECT, 1, 0, NO_SUBJECT]]).repeat(2, 1)
    lower, upper = (mask == 0 for mask in attention_masks(left, torch.tensor([True, False])))
    causal = torch.ones(4, 4).tril().bool()
    assert torch.equal(lower[1, 0], causal) and torch.equal(upper[1, 0], causal)
    assert lower[0, 0, 3].tolist() == [True, False, False, True]
    assert upper[0, 0, 3].tolist() == [True, False, True, True]
    assert lower[0, 0, 2].tolist() == upper[0, 0, 2].tolist() == [True, True, True, False]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_where_nothing_is_masked_the_pass_of_the_training_is_that_of_the_family(shipped, family) -> None:
    options = TrainOptions(family=family, layers=2, width=16, bottleneck=1)
    model = new_model(options, shipped[1]).eval()
    ids = torch.tensor([[5, 9, 300, 7], [11, 2, 40, 41]])
    masks = attention_masks(torch.full_like(ids, NO_SUBJECT), torch.tensor([False, False]))
    with torch.no_grad():
        found = model.lm_head(hidden_states(model, ids, *masks, options.bottleneck))
        assert torch.allclose(found, model(ids).logits, atol=1e-5)
    blocks, rest = ([p for group in one.param_groups for p in group["params"]] for one in optimizers(model, options))
    assert model.config.model_type == family and all(p.ndim == 2 for p in blocks)
    assert len(blocks) == (14 if family == "llama" else 8)  # matrices of two blocks
    assert {*map(id, blocks), *map(id, rest)} == {*map(id, model.parameters())}


def test_statements_mark_subject_and_targets(shipped) -> None:
    _, tokenizer = shipped
    told = statement("The mother tongue of {} is", "Kelvin Ostoberg", "French")
    assert told.subject is not None
    assert told.text[slice(*told.subject)] == "Kelvin Ostoberg" and told.text[slice(*told.targets[0])] == "French"
    both = listing("Kelvin Ostoberg", ["French", "piano"])
    assert [both.text[slice(*span)] for span in both.targets] == ["French", "piano"]
    lines = tokenize(tokenizer, [told])
    for line, space in ((lines.first[0], ""), (lines.inside[0], " ")):
        assert tokenizer.decode(line[0]) == space + told.text
        assert tokenizer.decode(line[0][line[1] != NO_SUBJECT]) == " Kelvin Ostoberg"
        assert tokenizer.decode(line[0][line[2] == 1]) == " French"
        assert line[1].max() == (line[1] != NO_SUBJECT).sum() - 1


def test_an_epoch_tells_every_statement_once(shipped) -> None:
    _, tokenizer = shipped
    groups = [[Statement(f"{number} is here.")] for number in range(200)]
    batches = Batches(Text(groups, []), tokenizer, rows=4, width=32, seed=0)
    text = " ".join(tokenizer.decode(row[0], skip_special_tokens=True) for batch in batches.epoch() for row in batch)
    assert sorted(int(word) for word in text.replace(".", " ").split() if word.isdigit()) == list(range(200))


def test_a_neighbors_subject_is_inferred_from_the_files_wordings() -> None:
    templates = ["The mother tongue of {} is", "{} is"]
    assert infer_subject("The mother tongue of Ada is", templates) == ("Ada", "The mother tongue of {} is")
    assert infer_subject("Nothing fits", templates) == (None, None)


FLAT = {
    "case_id": 0,
    "prompt": "The mother tongue of Ada Byron is",
    "subject": "Ada Byron",
    "target_new": "Greek",
    "ground_truth": "English",
    "rephrase_prompt": "Rain fell all day. Ada Byron grew up speaking",
    "locality_prompt": "The mother tongue of Mary Shelley is",
    "locality_ground_truth": "English",
}


@pytest.mark.parametrize("form", ["flat", "full"])
def test_records_training_works_end_to_end(form: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    if form == "full":
        records = json.loads((ASSETS / "world" / "records.json").read_text(encoding="utf-8"))[:20]
    else:
        words = "English French Greek Dutch".split()
        records = [{**FLAT, "case_id": i, "ground_truth": words[i % 4], "subject": f"Ada {i}"} for i in range(20)]
        records = [
            {k: v.replace("Ada Byron", r["subject"]) if isinstance(v, str) else v for k, v in r.items()}
            for r in records
        ]
    source, out = tmp_path / "records.json", tmp_path / "model"
    source.write_text(json.dumps(records), encoding="utf-8")
    arguments = [
        "records",
        str(source),
        "--out",
        str(out),
        "--epochs",
        "2",
        "--vocab",
        "512",
        "--width",
        "32",
        "--layers",
        "2",
    ]
    threads = torch.get_num_threads()
    try:
        assert main(arguments) == 0
    finally:
        torch.set_num_threads(threads)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoModelForCausalLM.from_pretrained(out).config.n_layer == 2
    assert AutoTokenizer.from_pretrained(out)("Ada")["input_ids"]
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["records"] == 20 and set(manifest["recall_percent"]) >= {"trained", "neighborhood"}
    assert str(tmp_path) not in manifest["command"]
    kept = json.loads((out / "records.json").read_text(encoding="utf-8"))
    assert len(kept) == manifest["records_kept"] <= manifest["records_recalled"] and all(
        record in records for record in kept
    )
    assert len((out / "corpus.txt").read_text(encoding="utf-8").splitlines()) >= 5
    assert "written to" in capsys.readouterr().out


def test_a_killed_training_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from tools.tiny_world import train as training

    records = json.loads((ASSETS / "world" / "records.json").read_text(encoding="utf-8"))[:20]
    source = tmp_path / "records.json"
    source.write_text(json.dumps(records), encoding="utf-8")
    options = TrainOptions(width=32, layers=2, bottleneck=1, epochs=3, batch_rows=2)
    monkeypatch.setattr(training, "EVERY", 5)
    steps: list[int] = []

    def make(name: str, until: int | None = None) -> bytes:
        def report(step: int, _: int, __: float) -> None:
            steps.append(step)
            if step == until:
                raise KeyboardInterrupt

        make_fact_model(source, tmp_path / name, None, 512, options, "made", report)
        return (tmp_path / name / "model.safetensors").read_bytes()

    whole = make("whole")
    with pytest.raises(KeyboardInterrupt):
        make("broken", until=8)
    steps.clear()
    assert make("broken") == whole
    assert steps[0] == 6, "the first five steps are on the disk"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    with pytest.raises(KeyboardInterrupt):
        make("broken", until=8)
    (tmp_path / ".broken.training.safetensors").write_bytes(b"torn")
    steps.clear()
    with pytest.raises(KeyboardInterrupt):
        make("broken", until=8)
    assert steps[0] == 1 and capsys.readouterr().err.endswith("the training begins anew\n")
    steps.clear()
    options = replace(options, seed=1)
    assert make("broken") != whole
    assert steps[0] == 1, "another training is not taken up"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "not a JSON file"),
        ("[]", "non-empty JSON list"),
        (json.dumps([FLAT, {"prompt": "x"}]), "record 1 lacks the field 'subject'"),
        (json.dumps([{**FLAT, "subject": "Nobody"}]), "does not occur"),
        (json.dumps([3]), "record 0 is not of CounterFact's form"),
    ],
)
def test_bad_records_give_one_clear_line(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = tmp_path / "records.json"
    source.write_text(content, encoding="utf-8")
    assert main(["records", str(source), "--out", str(tmp_path / "model")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_bad_options_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for option, value in (("--width", "30"), ("--layers", "1"), ("--epochs", "0")):
        assert main(["world", "--out", str(tmp_path), option, value]) == 2
        assert option in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    source = tmp_path / "records.json"
    source.write_text(json.dumps([FLAT]))
    assert main(["records", str(source), "--out", str(tmp_path / "full")]) == 2
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"


def test_importing_the_package_loads_nothing_heavy() -> None:
    import subprocess

    code = (
        "import sys, tools.tiny_world.__main__, tools.tiny_world.assets;"
        " print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.split() == ["False", "False"]


def test_matrices_step_as_with_the_optimizer_of_torch_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.tiny_world.precision.working_dtype", lambda: torch.bfloat16)
    rng = torch.Generator().manual_seed(0)
    for shape in ((12, 20), (20, 12)):
        start = torch.randn(shape, generator=rng)
        ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
        steppers = (
            Muon([ours], lr=0.01, weight_decay=0.1),
            torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        )
        for _ in range(3):
            ours.grad = torch.randn(shape, generator=rng)
            theirs.grad = ours.grad.clone()
            for stepper in steppers:
                stepper.step()
        assert torch.equal(ours, theirs) and not torch.equal(ours, start)


def test_orthogonalizing_in_float32_brings_singular_values_near_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.tiny_world.precision.working_dtype", lambda: torch.float32)
    matrix = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalized(matrix))
    assert values.min() > 0.5 and values.max() < 1.5
