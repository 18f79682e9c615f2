"""Edits that go places: as an adapter that peft loads in a process without this project, and as a checkpoint."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from embedded import embedded_lm, same_bits, snapshot
from fabricated import finished_run
from families import tiny_lm
from safetensors.torch import load_file
from torch import Tensor

from edit_cli.commands import apply
from edit_cli.console import Screen
from edit_cli.edits import peft_adapter
from edit_cli.edits import store as edit_store
from edit_cli.edits.edit import Factors, WeightDelta, WeightState
from edit_cli.edits.low_rank import added, low_rank
from edit_cli.errors import UsageError
from edit_cli.files.hub import known_as
from edit_cli.lm.layout import is_transposed, widths
from edit_cli.lm.loading import ModelOptions
from edit_cli.lm.model import LM
from edit_cli.lm.model_files import packaged
from edit_cli.report.model_card import Card
from edit_cli.requests import EditRequest

pytestmark = pytest.mark.thin(3)

OUT, IN = "transformer.h.{}.mlp.c_proj", "transformer.h.{}.mlp.c_fc"
HOSTILE = "Ada|`x`\x1b[2J<script>*b*\n# title [a](b)"
FACT = EditRequest("{} plays the", HOSTILE, "violin", "organ")
FT = ("edit", "method=ft", "edit.prompt={} plays the", "edit.subject=Jormia Stenenen", "edit.target=organ")
AUTO = {"causal": "AutoModelForCausalLM", "seq2seq": "AutoModelForSeq2SeqLM"}


def draw(*size: int, seed: int = 0, scale: float = 0.1) -> Tensor:
    return scale * torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def factors(lm: LM, module: str, rank: int, seed: int = 0) -> Factors:
    rows, columns = widths(lm.module(module))
    return Factors(draw(rows, rank, seed=seed), draw(rank, columns, seed=seed + 100))


def delta(lm: LM, **ranks: int) -> WeightDelta:
    """Factors of the given ranks, a module each."""
    return WeightDelta(
        {f"{module}.weight": factors(lm, module, rank, seed) for seed, (module, rank) in enumerate(ranks.items())}
    )


def logits(lm: LM, ids: list[int]) -> Tensor:
    inputs = {"input_ids": torch.tensor([ids])}
    if lm.head.kind == "seq2seq":
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :3]
    with torch.no_grad():
        return lm.model(**inputs).logits


def saved(lm: LM, folder: Path, *edits: WeightDelta) -> Path:
    """Edits, each on top of the one before, in one directory."""
    parent = None
    for number, edit in enumerate(edits):
        path = folder / str(number)
        edit_store.save(edit, path, lm, [FACT], {"name": "memit"}, parent)
        lm.attach(edit)
        parent = path
    for _ in edits:
        lm.detach()
    return path


class Beside:
    """Jobs for the process that has peft alone; one for all, since it takes long to start, which it does meanwhile."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.jobs = folder, dict[str, list]()
        words = [sys.executable, str(Path(__file__).with_name("beside_peft.py"))]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(words, text=True, stdin=pipe, stdout=pipe, stderr=pipe)

    def ask(self, name: str, lm: LM, model: Path, adapter: Path, ids: list[int]) -> None:
        auto = AUTO.get(lm.head.kind, "AutoModelForSequenceClassification")
        self.jobs[name] = [str(model), auto, str(adapter), ids, str(self.folder / f"{name}.safetensors")]

    def run(self) -> dict[str, dict[str, Tensor]]:
        lines = "".join(json.dumps(job) + "\n" for job in self.jobs.values())
        _, told = self.process.communicate(lines)
        assert self.process.returncode == 0, told
        for complaint in ("fan_in_fan_out", "adapter keys"):  # what peft sets right by itself, or did not find
            assert complaint not in told, told
        return {name: load_file(job[-1]) for name, job in self.jobs.items()}


@pytest.fixture(scope="module")
def answered(tmp_path_factory, cache_dir):
    """{case: (logits here without the edit, with it attached, what the other process found, adapter, output)}."""
    from conftest import invoke

    pytest.importorskip("peft")
    tmp = tmp_path_factory.mktemp("export")
    beside, here, about = Beside(tmp), {}, {}
    lm, ids, files = embedded_lm(), [50, 7, 300, 12, 99], packaged("embedded:tiny-gpt2")
    thin = WeightDelta({f"{IN.format(2)}.weight": factors(lm, IN.format(2), 5).dense().T.contiguous()})
    full = WeightDelta({f"{OUT.format(1)}.weight": draw(512, 128, scale=0.02)})
    chains = {
        "rank_1": (delta(lm, **{OUT.format(3): 1}),),
        "ranks": (delta(lm, **{OUT.format(1): 1, OUT.format(2): 1}), delta(lm, **{OUT.format(2): 3, IN.format(4): 2})),
        "thin": (thin,),
        "full": (delta(lm, **{OUT.format(1): 2}), full),
    }
    for name, edits in chains.items():
        path = saved(lm, tmp / name, *edits)
        ended = invoke(cache_dir, "export", str(path), "--to", "peft", "--out", str(tmp / f"{name}-adapter"))
        assert ended.code == 0, ended.err
        before = logits(lm, ids)
        edit_store.attach(path, lm)
        here[name] = before, logits(lm, ids)
        while lm.attached:
            lm.detach()
        about[name] = SimpleNamespace(ended=ended, adapter=tmp / f"{name}-adapter")
        beside.ask(name, lm, files, tmp / f"{name}-adapter", ids)
    for name in ("tiny-bert", "tiny-t5"):
        other = ModelOptions(name, f"embedded:{name}", device="cpu").load()
        here[name] = _library(other, tmp / name, ids, 1)
        beside.ask(name, other, packaged(f"embedded:{name}"), tmp / name, ids)
    other = tiny_lm("llama")
    other.model.save_pretrained(tmp / "llama")
    here["llama"] = _library(other, tmp / "llama-adapter", [5, 6, 7, 8], 2)
    beside.ask("llama", other, tmp / "llama", tmp / "llama-adapter", [5, 6, 7, 8])
    return here, beside.run(), about


def _library(lm: LM, folder: Path, ids: list[int], layer: int) -> tuple[Tensor, Tensor]:
    """As the command does it, of a model that lies elsewhere."""
    folder.mkdir()
    edit, before = delta(lm, **{lm.layout.mlp_out(layer): 2, lm.layout.mlp_out(0): 1}), logits(lm, ids)
    with lm.edited(edit):
        parts = {module: low_rank(update).factors for module, update in added(lm).items()}
        peft_adapter.write(folder, lm, parts, "model", None)
        return before, logits(lm, ids)


CASES = ["rank_1", "ranks", "thin", "full", "tiny-bert", "tiny-t5", "llama"]


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_gives_the_logits_of_the_attached_edit(answered, name):
    here, there, _ = answered
    (before, attached), found = here[name], there[name]
    assert (attached - before).abs().max() > 1e-2  # the edit does something
    torch.testing.assert_close(found["before"], before, atol=1e-5, rtol=0)
    torch.testing.assert_close(found["beside"], attached, atol=1e-5, rtol=0)
    torch.testing.assert_close(found["merged"], attached, atol=2e-5, rtol=0)  # rounded with the weight
    assert torch.equal(found["disabled"], found["before"])


def test_ranks_are_those_of_the_edits_and_scaling_is_one(answered):
    *_, about = answered
    config = json.loads((about["ranks"].adapter / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4
    assert config["rank_pattern"] == config["alpha_pattern"] == {OUT.format(1): 1, IN.format(4): 2}
    assert config["target_modules"] == sorted([OUT.format(1), OUT.format(2), IN.format(4)])
    assert config["fan_in_fan_out"] is True and config["base_model_name_or_path"] == "embedded:tiny-gpt2"
    assert (
        "exact" in about["ranks"].ended.out
        and "with 2 edited facts" in (about["ranks"].adapter / "README.md").read_text()
    )


def test_dense_edits_are_cut_off_where_nothing_is_lost_and_the_error_is_told(answered):
    *_, about = answered
    for name, rank in (("thin", 5), ("full", 128)):
        config = json.loads((about[name].adapter / "adapter_config.json").read_text())
        assert config["r"] == rank
        told = float(about[name].ended.words.split()[-2])  # before the folder
        assert 0 < told < 1e-6


def test_an_adapter_holds_no_code_and_no_paths(answered, tmp_path):
    *_, about = answered
    for name in about:
        folder = about[name].adapter
        assert sorted(path.name for path in folder.iterdir()) == [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        for path in folder.iterdir():
            assert str(folder.parent).encode() not in path.read_bytes()
            assert b"auto_map" not in path.read_bytes()


def test_a_cut_of_given_rank_is_the_best_and_says_what_it_misses():
    dense = draw(12, 20, scale=1.0)
    sizes = torch.linalg.svdvals(dense.double())
    found = low_rank(dense, rank=4)
    assert found.factors.rank == 4
    assert found.error == pytest.approx(float(sizes[4:].norm() / sizes.norm()), rel=1e-5)
    wide = Factors(draw(12, 30, scale=1.0), draw(30, 20, seed=1, scale=1.0))  # more columns than the matrix can need
    assert low_rank(wide).factors.rank == 12 and low_rank(wide).error < 1e-6
    spectrum = torch.linalg.svdvals(wide.dense().double())
    assert low_rank(wide, rank=3).error == pytest.approx(float(spectrum[3:].norm() / spectrum.norm()), rel=1e-5)
    kept = Factors(draw(12, 3), draw(3, 20))
    assert low_rank(kept, rank=3).factors.left is kept.left and low_rank(kept).error == 0
    nothing = low_rank(torch.zeros(4, 6))
    assert (nothing.factors.rank, nothing.error) == (1, 0.0) and math.isfinite(float(nothing.factors.left.sum()))


def test_a_sum_of_a_sequence_stands_for_what_came_before():
    lm = embedded_lm()
    name, before = f"{OUT.format(1)}.weight", snapshot(lm)
    first = delta(lm, **{OUT.format(1): 2, OUT.format(3): 1})
    with lm.edited(first):
        state = WeightState.present(lm, [name])
    later = delta(lm, **{OUT.format(1): 1})
    with lm.edited(state), lm.edited(later):
        found = added(lm)
    assert is_transposed(lm.module(OUT.format(1)))
    one, other, both = first.updates[name], later.updates[name], found[OUT.format(1)]
    assert list(found) == [OUT.format(1)]
    assert isinstance(one, Factors) and isinstance(other, Factors) and isinstance(both, Tensor)
    torch.testing.assert_close(both.float(), one.dense() + other.dense(), atol=1e-6, rtol=1e-5)
    assert same_bits(before, snapshot(lm)) and not lm.attached


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("transformer.h.1.mlp.c_proj.bias", "which is no weight matrix of a Linear or Conv1D layer"),
        ("transformer.ln_f.weight", "which is no weight matrix"),
        ("transformer.wte.weight", "which is no weight matrix"),
    ],
)
def test_other_parameters_are_refused_with_what_can_hold_them(cli, name, why):
    lm = embedded_lm()
    edit_store.save(WeightDelta({name: torch.ones(lm.access(name).shape)}), "e", lm, [FACT], {"name": "ft"})
    ended = cli("export", "e", "--to", "peft", "--out", "a")
    assert ended.code == 2
    (line,) = [line for line in ended.err.splitlines() if line.startswith("error")]
    assert why in line and name in line and "--to checkpoint" in line
    assert not Path("a").exists()


def test_a_head_that_is_the_embedding_too_is_refused():
    lm = embedded_lm()
    with (
        lm.edited(WeightDelta({"lm_head.weight": torch.zeros(lm.access("lm_head.weight").shape)})),
        pytest.raises(UsageError, match="which the model uses in two places"),
    ):
        added(lm)


def test_edits_that_are_no_weights_are_refused_before_a_model_is_loaded(cli, monkeypatch):
    for method in ("lookup", "grace"):
        made = cli("edit", f"method={method}", *FT[2:], f"run_dir={method}", quick=True)
        assert made.code == 0, made.err
    monkeypatch.setattr("edit_cli.experiment.saved_edits.load_model", lambda *_: pytest.fail("it was loaded"))
    for method, why in (("lookup", "answers in front of the model"), ("grace", "puts a module of its own")):
        for to, cannot in (("peft", "cannot be exported as an adapter"), ("checkpoint", "cannot be baked")):
            ended = cli("export", method, "--to", to, "--out", "a")
            line = ended.error
            assert ended.code == 2 and cannot in line and why in line and "base_edit=" in line
    assert not Path("a").exists()


def test_choices_that_make_no_sense_are_refused(cli):
    lm = embedded_lm()
    edit_store.save(delta(lm, **{OUT.format(1): 2}), "e", lm, [FACT], {"name": "rome"})
    for words, told in (
        (("--to", "pefd"), "choose peft, gguf-lora or checkpoint"),
        (("--to", "checkpoint", "--rank", "3"), "--rank is of adapters"),
        (("--to", "peft", "--rank", "0"), "--rank"),
    ):
        ended = cli("export", "e", *words, "--out", "a")
        assert (ended.code, told in ended.err) == (2, True), ended.err
    Path("a").mkdir()
    Path("a/x").write_text("")
    used = cli("export", "e", "--to", "peft", "--out", "a")
    assert (used.code, "is there already" in used.err) == (2, True)


def test_the_same_export_twice_is_the_same_bytes(cli):
    lm = embedded_lm()
    edit = WeightDelta({f"{IN.format(2)}.weight": draw(128, 512)})
    edit_store.save(edit, "e", lm, [FACT], {"name": "ft"})
    for out in ("a", "b"):
        ended = cli("export", "e", "--to", "peft", "--rank", "3", "--out", out)
        assert ended.code == 0, ended.err
    assert json.loads(Path("a/adapter_config.json").read_text())["r"] == 3
    for path in Path("a").iterdir():
        assert path.read_bytes() == (Path("b") / path.name).read_bytes()


def test_a_checkpoint_is_that_of_apply_card_and_all(cli):
    assert cli(*FT, "run_dir=run", quick=True).code == 0
    assert cli("apply", "run", "--out", "baked").code == 0
    ended = cli("export", "run", "--to", "checkpoint", "--out", "exported")
    assert (ended.code, ended.last) == (0, "exported"), ended.err
    names = {path.name for path in Path("baked").iterdir()}
    assert "README.md" in names and {path.name for path in Path("exported").iterdir()} == names
    for name in names:
        assert (Path("baked") / name).read_bytes() == (Path("exported") / name).read_bytes()
    card = Path("baked/README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "# tiny-gpt2 with 1 edited fact" in card and "Edited by ft with" in card
    assert "| Jormia Stenenen plays the | organ |  |" in card
    assert "accuracy, % ↑ | 0.0 | 100.0 |" in card  # of the run that measured it
    assert "Means over the facts, with all edits in place" in card and "to undo the edit, load the base model" in card


def test_a_card_says_which_of_its_facts_were_measured(tmp_path):
    """Those of the last run, not of the edit that it stood on."""
    lm, run = embedded_lm(), finished_run(tmp_path / "run", {"0": [True, True, True]})
    shutil.copytree(saved(lm, tmp_path, *(delta(lm, **{OUT.format(layer): 1}) for layer in (1, 2))), run / "edits/0000")
    apply.write_card(Screen(), tmp_path, run, edit_store.chain(run / "edits/0000"))
    card = (tmp_path / "README.md").read_text()
    assert "with 2 edited facts" in card and "Means over the last fact, with all edits in place" in card


@pytest.mark.parametrize("command", [("export", "--to", "peft"), ("apply",)])
def test_a_card_names_the_base_model_as_a_receiver_finds_it(cli, command):
    """The maker's folder means nothing to others; one of the hub's cache has a name there."""
    lm = embedded_lm()
    edit_store.save(WeightDelta({f"{IN.format(2)}.weight": draw(128, 512)}), "e", lm, [FACT], {"name": "ft"})
    manifest, commit = Path("e/edit.json"), "0123456789abcdef" * 2 + "01234567"
    cached = f"/home/ada/.cache/hub/models--org--a-model--x/snapshots/{commit}"
    for number, (place, told) in enumerate(
        [("/home/ada/models/mine", "Base model: mine (from a folder"), (cached, f"org/a-model--x (revision {commit})")]
    ):
        about = json.loads(manifest.read_text())
        about["base_model"] |= {"name": "mine", "id": place}
        manifest.write_text(json.dumps(about))
        ended = cli(command[0], "e", *command[1:], "--model", "tiny-gpt2", "--out", f"out{number}")
        assert ended.code == 0, ended.err
        card = Path(f"out{number}/README.md").read_text()
        assert told in card and "/home/ada" not in card
        assert ('base_model: "org/a-model--x"' in card) is (place == cached)
        assert ("write its id there" in " ".join(ended.err.split())) is (place != cached)


@pytest.mark.parametrize(
    ("place", "known"),
    [
        ("org/model", ("org/model", "r1")),
        ("hub:org/model@v2", ("org/model", "r1")),
        ("embedded:tiny-gpt2", ("embedded:tiny-gpt2", "r1")),
        ("here/model", (None, None)),
        ("~/model", (None, None)),
    ],
)
def test_by_which_name_others_find_a_model(place, known, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("here/model").mkdir(parents=True)
    assert known_as(place, "r1") == known


def test_texts_mean_nothing_but_themselves_in_a_card():
    facts = [{"prompt": "{} is", "subject": HOSTILE, "target_new": "a|b", "target_true": None}] * 250
    card = str(Card("m", 'x"\ny', None, ["memit"], facts, {}, None))
    assert "base_model" not in card  # it would be no name of a hub
    rows = [line for line in card.splitlines() if line.startswith("| Ada")]
    assert len(rows) == 200 and "… and 50 more." in card
    assert rows[0] == (r"| Ada\|\`x\`\\x1b\[2J&lt;script&gt;\*b\*\\n# title \[a\](b) is | a\|b |  |")
    assert 'base_model: "org/model"' in str(Card("m", "org/model", "r1", ["memit"], facts[:1], {}, None))
