"""Published settings of trained editors: which matrices of the papers' models they edit, and how they train."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from families import tiny_lm
from hydra import compose, initialize_config_module
from torch import nn

import edit_cli
from edit_cli.config.build import register_resolvers
from edit_cli.editors.base import Method
from edit_cli.experiment.setup import method_of
from edit_cli.lm.model import LM

# as deep as the published models, and as thin as can be
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-base-uncased": ("bert", {"num_hidden_layers": 12}),
    "bart-base": ("bart", {"encoder_layers": 6, "decoder_layers": 6}),
    "distilgpt2": ("gpt2", {"num_hidden_layers": 6}),
    "gpt2": ("gpt2", {"num_hidden_layers": 12}),
    "gpt2-xl": ("gpt2", {"num_hidden_layers": 48}),
    "gpt-neo-2.7b": ("gpt_neo", {"num_hidden_layers": 32, "attention_types": [[["global", "local"], 16]]}),
    "gpt-j-6b": ("gptj", {"num_hidden_layers": 28}),
    "t5-small-ssm-nq": ("t5_v1_1", {"num_layers": 8, "num_decoder_layers": 8}),
    "t5-large-ssm-nq": ("t5", {"num_layers": 24, "num_decoder_layers": 24}),
    "t5-xl-ssm-nq": ("t5_v1_1", {"num_layers": 24, "num_decoder_layers": 24}),
    "t5-xxl-ssm-nq": ("t5_v1_1", {"num_layers": 24, "num_decoder_layers": 24}),
}


@cache
def model(name: str) -> LM:
    family, sizes = MODELS[name]
    return tiny_lm(family, **sizes)


def method(name: str, model: str) -> Method:
    register_resolvers()
    with initialize_config_module("edit_cli.conf", version_base="1.3"):
        return method_of(compose("train-editor", [f"method={name}", f"model={model}", "dataset=zsre_qa"]).method)


def config(name: str, model: str) -> Any:
    return method(name, model).config


def modules(name: str, on: str) -> list[str]:
    editor: Any = method(name, on).begin(model(on))
    return editor.modules


def both(blocks: str, numbers: range, *names: str) -> list[str]:
    return [f"{blocks}.{number}.{name}" for number in numbers for name in names]


BERT = both("bert.encoder.layer", range(9, 12), "intermediate.dense", "output.dense")
BART = [name for part in ("encoder", "decoder") for name in both(f"model.{part}.layers", range(4, 6), "fc1", "fc2")]


def t5(numbers: range, *names: str) -> list[str]:
    encoder = both("encoder.block", numbers, *(f"layer.1.DenseReluDense.{name}" for name in names))
    return encoder + both("decoder.block", numbers, *(f"layer.2.DenseReluDense.{name}" for name in names))


EDITED = {
    ("mend", "bert-base-uncased"): BERT,
    ("mend", "bart-base"): BART,
    ("mend", "distilgpt2"): both("transformer.h", range(3, 6), "mlp.c_fc", "mlp.c_proj"),
    ("mend", "gpt2-xl"): both("transformer.h", range(45, 48), "mlp.c_fc", "mlp.c_proj"),
    ("mend", "gpt-neo-2.7b"): both("transformer.h", range(29, 32), "mlp.c_fc", "mlp.c_proj"),
    ("mend", "gpt-j-6b"): both("transformer.h", range(25, 28), "mlp.fc_in", "mlp.fc_out"),
    ("mend", "t5-small-ssm-nq"): t5(range(6, 8), "wi_0", "wo"),
    ("mend", "t5-large-ssm-nq"): t5(range(22, 24), "wi", "wo"),
    ("mend", "t5-xl-ssm-nq"): t5(range(22, 24), "wi_0", "wo"),
    ("mend", "t5-xxl-ssm-nq"): t5(range(22, 24), "wi_0", "wo"),
    ("enn", "bert-base-uncased"): BERT,
    ("enn", "bart-base"): BART,
    ("enn", "distilgpt2"): both("transformer.h", range(3, 6), "mlp.c_fc", "mlp.c_proj"),
    ("enn", "t5-large-ssm-nq"): t5(range(22, 24), "wi", "wo"),
    ("malmen", "bert-base-uncased"): both("bert.encoder.layer", range(6, 12), "output.dense"),
    ("malmen", "gpt2"): both("transformer.h", range(6, 12), "mlp.c_proj"),
    ("malmen", "gpt-j-6b"): both("transformer.h", range(22, 28), "mlp.fc_out"),
    ("malmen", "t5-small-ssm-nq"): t5(range(4, 8), "wo"),
    ("malmen", "t5-xl-ssm-nq"): t5(range(22, 24), "wi_0", "wo"),
}


@pytest.mark.parametrize(("method", "name"), EDITED)
def test_the_published_matrices_are_edited(method, name):
    assert modules(method, name) == EDITED[method, name]


@pytest.mark.parametrize("name", ["bert-base-uncased", "bart-base"])
def test_ke_edits_every_matrix_of_every_block(name):
    """All but embeddings and what comes after the blocks."""
    lm = model(name)
    editor: Any = method("ke", name).begin(lm)
    linear = [name for name, module in lm.model.named_modules() if isinstance(module, nn.Linear)]
    left_out = {name for name in linear if name.startswith(("bert.pooler", "classifier", "lm_head"))}
    assert set(editor.modules) == set(linear) - left_out and editor.lowest == 0
    assert len(editor.modules) == len(set(editor.modules))


def test_how_they_train():
    """Optimizer steps, batches and rates of the papers; their ten micro-batches are ten independent edits."""
    for name in ("bert-base-uncased", "bart-base", "gpt-j-6b", "t5-xl-ssm-nq"):
        mend = config("mend", name)
        assert (mend.rank, mend.edit_weight, mend.locality_weight, mend.size) == (1920, 0.1, 1.0, "gradient")
        assert (mend.step_size, mend.step_lr, mend.training.lr) == (1e-4, 1e-4, 1e-6)
        assert mend.training.edits * mend.training.accumulate == 10 and mend.edits == 1
        assert mend.training.steps * 10 == 500_000 and mend.training.patience * 10 == 20_000
        assert mend.draw.stays == ("text" if name.startswith("gpt") else "answer")
    enn = config("enn", "distilgpt2")
    assert (enn.steps, enn.base_weight, enn.step_size, enn.step_lr, enn.training.lr) == (1, 10.0, 1e-2, 1e-3, 1e-5)
    claims, questions = (config("ke", name) for name in ("bert-base-uncased", "bart-base"))
    assert [(ke.training.edits, 1 + ke.others, ke.training.steps) for ke in (claims, questions)] == [
        (1, 256, 50_000),
        (4, 64, 200_000),
    ]
    assert [(ke.bound.start, ke.bound.least, ke.smoothing) for ke in (claims, questions)] == [
        (1e-1, 1e-3, 0.0),
        (1e-3, 1e-5, 0.1),
    ]
    assert all(
        (ke.training.optimizer, ke.training.lr, ke.training.warmup) == ("rmsprop", 3e-4, 1000)
        for ke in (claims, questions)
    )
    malmen = {name: config("malmen", name) for method, name in EDITED if method == "malmen"}
    assert {name: made.edits for name, made in malmen.items()} == {
        name: 1024 if name == "bert-base-uncased" else 512 for name in malmen
    }
    assert all((made.training.lr, made.training.clip, made.rank) == (1e-5, 1.0, 1920) for made in malmen.values())
    serac, judge = config("serac", "t5-large-ssm-nq"), config("serac", "bert-base-uncased")
    assert (serac.scope.kind, judge.scope.kind) == ("embedding", "cross")
    assert all(
        (made.training.edits, made.training.accumulate, made.training.lr) == (10, 10, 1e-5) for made in (serac, judge)
    )
    assert judge.counterfactual.sizes["id2label"] == {0: "REFUTES", 1: "SUPPORTS"}


def test_settings_that_were_not_run_say_so():
    folder = Path(edit_cli.__file__).parent.parent / "conf" / "tuned"
    for method in ("mend", "enn", "ke", "serac", "malmen"):
        for file in (folder / method).glob("*.yaml"):
            assert file.stem.startswith("tiny-") or "Not run here." in file.read_text(encoding="utf-8"), file


@pytest.mark.slow
def test_second_moments_are_as_published_where_settings_are_and_cheap_elsewhere():
    """Settings of the locate family for a model go with second moments of as much text as their authors took."""
    root = Path(edit_cli.__file__).parent.parent / "conf"
    methods = ("rome", "r-rome", "memit", "memit-merge", "emmet", "pmet", "alphaedit", "blue")
    own = ("transferred", "measured")  # in the comment of settings that no paper has

    def published(name: str) -> bool:
        files = [file for method in methods if (file := root / "tuned" / method / f"{name}.yaml").exists()]
        return any(not any(word in file.read_text(encoding="utf-8").lower() for word in own) for file in files)

    found: dict[str, Any] = {}
    register_resolvers()
    with initialize_config_module("edit_cli.conf", version_base="1.3"):
        for name in sorted(file.stem for file in (root / "model").glob("*.yaml") if file.stem != "hf"):
            node = compose("precompute-stats", [f"model={name}", "method=memit"])
            found[name] = node.stats.tokens
    assert found == {name: None if published(name) else "auto" for name in found}
    assert {"gpt2-xl", "tiny-gpt2", "llama-3-8b"} <= {name for name, tokens in found.items() if tokens is None}
