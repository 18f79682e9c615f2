"""Loading a model: local folders, the hub and its cache, places and dtypes; what is missing or damaged is one line,
at once.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import edit_cli.conf
import pytest
import torch
from families import DEPTH, quiet, tiny
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from edit_cli.config.build import build, register_resolvers
from edit_cli.config.source import with_defaults
from edit_cli.errors import MissingError, OutOfMemory, UsageError
from edit_cli.lm import model_files
from edit_cli.lm.layout import LayoutOptions
from edit_cli.lm.loading import ModelOptions
from edit_cli.lm.model_files import packaged
from edit_cli.monitor import Monitor

PAIRS = [("The capital of France is", "Paris"), ("Ada Lund lives in", "Oslo")]
CONF = Path(edit_cli.conf.__file__).parent / "model"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny Llama as save_pretrained writes it."""
    directory = tmp_path_factory.mktemp("models") / "llama"
    model, words = tiny("llama")
    model.save_pretrained(directory)
    words.save_pretrained(directory)
    return directory


@pytest.fixture
def damaged(folder, tmp_path) -> Path:
    return shutil.copytree(folder, tmp_path / "model")


def load(path: Path | str, **fields):
    return ModelOptions("some-model", str(path), **fields).load()


def refused(path: Path | str, error: type[Exception] = MissingError, **fields) -> str:
    """The one line that is said."""
    with pytest.raises(error) as caught:
        load(path, **fields)
    (line,) = str(caught.value).splitlines()
    return line


# --- what loads
# ---------------------------------------------------------------------------------------------------------


def test_a_local_folder(folder):
    monitor = Monitor()
    lm = ModelOptions("some-model", str(folder), batch_tokens=100).load(monitor)
    model, words = tiny("llama")
    assert (lm.name, lm.revision, lm.dtype, lm.device) == ("some-model", None, torch.float32, torch.device("cpu"))
    assert lm.id == str(folder)
    assert lm.monitor is monitor
    assert lm.head.batch_tokens == 100
    assert len(lm.tokenizer) == len(words)
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(lm.parameter(name), parameter)


def test_a_relative_folder_and_one_in_the_home_directory(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    expected = load(folder).loglikelihood(PAIRS)
    for path in ("llama", "./llama", "~/llama"):
        assert load(path).loglikelihood(PAIRS) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_dtypes(folder, dtype):
    lm = load(folder, dtype=dtype)
    assert {parameter.dtype for parameter in lm.model.parameters()} == {getattr(torch, dtype)}
    assert lm.loglikelihood(PAIRS)[0].nll == pytest.approx(load(folder).loglikelihood(PAIRS)[0].nll, rel=5e-2)


@pytest.mark.parametrize(
    "key, value",
    [("device_map", "auto"), ("device_map", "cpu"), ("device", "cpu"), ("device", "auto"), ("device", "cpu:0")],
)
def test_places(folder, key, value):
    place = {key: value}
    lm = load(folder, **place)
    expected = load(folder, device="cpu").loglikelihood(PAIRS)
    assert [score.nll for score in lm.loglikelihood(PAIRS)] == pytest.approx(
        [score.nll for score in expected], abs=1e-3
    )
    assert lm.device.type == ("cuda" if torch.cuda.is_available() and "auto" in place.values() else "cpu")


def test_the_layout_is_handed_on(folder):
    layout = LayoutOptions(mlp_out="self_attn.o_proj")
    assert load(folder, layout=layout).layout.mlp_out(1) == "model.layers.1.self_attn.o_proj"
    line = refused(folder, UsageError, layout=LayoutOptions(blocks="nothing"))
    assert line == "model.layout.blocks=nothing names no module of this model"


def test_loading_prints_nothing(folder, capfd):
    load(folder)
    assert capfd.readouterr() == ("", "")


def test_loading_leaves_the_librarys_settings_as_they_were(folder):
    from transformers.utils import logging

    logging.enable_progress_bar()
    for verbosity in (logging.WARNING, logging.INFO):
        logging.set_verbosity(verbosity)
        load(folder)
        assert logging.get_verbosity() == verbosity
    logging.set_verbosity_warning()
    assert logging.is_progress_bar_enabled()


def test_the_embedded_model():
    lm = load("embedded:tiny-gpt2")
    assert lm.id == "embedded:tiny-gpt2"
    assert lm.loglikelihood(PAIRS)[0].nll > 0
    assert lm.layout.mlp_out(0) == "transformer.h.0.mlp.c_proj"


def test_packaged_files_are_those_of_the_assets_only():
    assert packaged("embedded:prose.txt").is_file()
    assert packaged("embedded:tiny-gpt2").is_dir()
    assert packaged("prose.txt") == packaged("embedded:prose.txt")
    for path in ("../errors.py", "world/../../errors.py", "/etc/hostname", "", ".", "nothing"):
        with pytest.raises(MissingError, match="names nothing that comes with edit-cli"):
            packaged(f"embedded:{path}")
    assert "embedded:no-such-model names nothing" in refused("embedded:no-such-model")


# --- what does not
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/no/such/folder", "./no/such/folder", "../nothing", "~/no-such-folder", "a/b/c"])
def test_a_folder_that_is_not_there(path):
    assert refused(path) == f"model.id={path}: no such folder"


def test_a_folder_without_a_model(tmp_path):
    assert "is a folder without config.json" in refused(tmp_path)


@pytest.mark.parametrize("dtype", ["int8", "half precision", "Tensor", ""])
def test_an_unknown_dtype(folder, dtype):
    choices = "auto, float32, bfloat16, float16 or float64"
    assert refused(folder, UsageError, dtype=dtype) == f"model.dtype={dtype}: choose {choices}"


@pytest.mark.parametrize("key", ["device", "device_map"])
def test_an_unknown_device(folder, key):
    assert (
        refused(folder, UsageError, **{key: "abacus"})
        == f"model.{key}=abacus is not available here; choose auto or cpu"
    )
    assert f"model.{key}=cuda:99 is not available here" in refused(folder, UsageError, **{key: "cuda:99"})


def test_weights_that_lie_on_no_device_are_refused(folder):
    for key in ("device", "device_map"):
        assert (
            refused(folder, UsageError, **{key: "meta"})
            == f"model.{key}=meta is not available here; choose auto or cpu"
        )


def edit_config(directory: Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_broken_weights(damaged):
    weights = damaged / "model.safetensors"
    whole = weights.read_bytes()
    for content in (b"", b"garbage" * 99, whole[:50], whole[: len(whole) // 2]):
        weights.write_bytes(content)
        assert refused(damaged).startswith(f"model.id={damaged}: its weights cannot be read: ")
    weights.unlink()
    assert "its weights cannot be read" in refused(damaged)


def test_a_broken_configuration(damaged):
    for content in ("{", "{}", "[]", '{"model_type": "no-such-family"}'):
        (damaged / "config.json").write_text(content)
        assert refused(damaged).startswith(f"model.id={damaged}: its config.json cannot be read: ")
    assert "does not know the architecture no-such-family; update transformers" in refused(damaged)


def test_a_broken_tokenizer(damaged):
    for content in ("{", "{}", '{"added_tokens": []}'):
        (damaged / "tokenizer.json").write_text(content)
        assert refused(damaged).startswith(f"model.id={damaged}: its tokenizer cannot be read: ")
    for file in damaged.glob("token*"):
        file.unlink()
    assert "its tokenizer cannot be read" in refused(damaged)


def test_weights_that_are_missing_are_not_made_up(damaged):
    edit_config(damaged, num_hidden_layers=DEPTH + 1, layer_types=None)
    line = refused(damaged)
    assert (
        line == f"model.id={damaged}: 9 weights are missing in its files, such as"
        f" model.layers.{DEPTH}.input_layernorm.weight"
    )


def test_weights_of_another_shape_are_not_replaced(damaged):
    edit_config(damaged, intermediate_size=99)
    line = refused(damaged)
    assert (
        line == f"model.id={damaged}: {3 * DEPTH} weights are of another shape in its files, such as"
        " model.layers.0.mlp.down_proj.weight"
    )


def test_tied_weights_are_not_missed(tmp_path):
    model, words = tiny("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    lm = load(tmp_path)
    assert lm.model.lm_head.weight is lm.model.transformer.wte.weight


def test_an_encoder_decoder_is_no_causal_model(damaged):
    with quiet():
        config = AutoConfig.for_model("t5", vocab_size=99, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
        AutoModelForSeq2SeqLM.from_config(config).save_pretrained(damaged)
    line = refused(damaged, UsageError, kind="causal")
    assert line == f"model.id={damaged} is of the family t5, which has no causal language model"


@pytest.mark.parametrize(
    ("dtype", "times", "told"),
    [("bfloat16", 18.2, True), ("float16", 18.2, True), ("bfloat16", 0.8, False), ("float32", 18.2, False)],
)
def test_a_dtype_that_the_processor_only_emulates_is_told(folder, dtype, times, told, monkeypatch):
    monkeypatch.setattr("edit_cli.lm.precision.slowdown", lambda kind: times)
    monitor, notes = Monitor(), list[str]()
    monkeypatch.setattr(monitor, "note", notes.append)
    ModelOptions("x", str(folder), dtype=dtype, device="cpu").load(monitor)
    found = [note for note in notes if f"model.dtype={dtype}" in note]
    assert bool(found) is told and all("18 times" in note for note in found)


def test_a_model_larger_than_what_is_free_is_refused_before_it_is_loaded(folder, monkeypatch):
    options = ModelOptions("llama", str(folder), device="cpu")
    assert options.outline is not None
    need = options.outline.bytes
    assert need == sum(weight.nbytes for weight in options.load().model.parameters())
    monkeypatch.setattr("edit_cli.lm.memory.free", lambda device: need - 1)
    with pytest.raises(OutOfMemory, match=r"cannot fit: .*kB in float32, .* free on cpu: choose model\.dtype=bfloat16"):
        options.load()
    assert replace(options, dtype="bfloat16").load().dtype == torch.bfloat16
    assert replace(options, refuse_too_large=False).load().dtype == torch.float32


def test_a_model_larger_than_the_device(folder, monkeypatch):
    from transformers import AutoModelForCausalLM

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40.00 GiB\nand more lines")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    line = refused(folder, OutOfMemory)
    assert "does not fit the device's memory in float32" in line
    assert "model.dtype" in line


# --- the hub, without a network
# -------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch, tmp_path) -> Path:
    """A hub that refuses connections, and its cache, empty."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    return hub_at(address, monkeypatch, tmp_path)


def hub_at(address: str, monkeypatch, tmp_path: Path) -> Path:
    from huggingface_hub import constants

    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("model_id", ["gpt2", "openai-community/gpt2-xl"])
def test_a_hub_id_without_a_network(model_id, offline, monkeypatch):
    asked = counted_requests(monkeypatch)
    line = refused(model_id)
    assert line.startswith(
        f"model.id={model_id} is no folder here and not in the hub's cache, and the hub cannot be reached ("
    )
    assert line.endswith("give a local folder instead: model.id=/path/to/folder (written by save_pretrained)")
    assert 1 <= len(asked) <= 2  # at once, and not after retries (a first failure may be the connection's)


def counted_requests(monkeypatch) -> list[str]:
    """Addresses that are asked for, one entry an attempt to connect."""
    asked: list[str] = []
    connect = socket.socket.connect

    def counted(self, address):
        asked.append(address)
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", counted)
    return asked


def test_a_hub_that_never_answers_is_waited_for_once(monkeypatch, tmp_path):
    monkeypatch.setattr(model_files, "TIMEOUT", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        hub_at(f"http://127.0.0.1:{silent.getsockname()[1]}", monkeypatch, tmp_path)
        asked = counted_requests(monkeypatch)
        assert "the hub cannot be reached (ReadTimeout)" in refused("gpt2")
        assert len(asked) == 1


def test_offline_mode_asks_nobody(monkeypatch, offline):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = counted_requests(monkeypatch)
    assert "and the hub cannot be reached" in refused("gpt2")
    assert asked == []


def test_what_the_hubs_cache_holds_loads_without_a_network(folder, offline, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = offline / "models--someone--tiny"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    asked = counted_requests(monkeypatch)
    lm = load("someone/tiny")
    assert lm.loglikelihood(PAIRS) == load(folder).loglikelihood(PAIRS)
    assert lm.revision == commit
    assert len(asked) <= 2
    assert load("someone/tiny", revision="main").revision == commit
    assert load("someone/tiny", revision=commit).revision == commit
    assert "not in the hub's cache" in refused("someone/tiny", revision="another")


@pytest.mark.parametrize("model_id", ["no id!", "a b", "-x-", "a..b"])
def test_what_is_no_hub_id_either(model_id, offline, monkeypatch):
    asked = counted_requests(monkeypatch)
    assert refused(model_id).startswith(
        f"model.id={model_id} is no folder here and no valid hub id; give a local folder instead"
    )
    assert asked == []


# --- conf/model
# -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted(CONF.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_packaged_model_is_described_and_built(file):
    text = file.read_text()
    summary, command = text.splitlines()[:2]
    assert re.fullmatch(r"# \S.{20,120}", summary)
    assert re.fullmatch(rf"#   edit-cli \w+ .*\bmodel={re.escape(file.stem)}\b.*", command)
    model = with_defaults(OmegaConf.create(text))
    assert model.pop("_target_") == "edit_cli.lm.loading.ModelOptions"
    if file.stem == "hf":
        register_resolvers()
        assert OmegaConf.is_missing(model, "id")
        model.id = "owner/model"
        whole: Any = OmegaConf.to_container(OmegaConf.create({"model": model}), resolve=True)
        model = OmegaConf.create(whole["model"])
        assert model.name == "model"
    else:
        assert model.name == file.stem
    options = build(model, ModelOptions)
    assert options.perplexity_text is None or packaged(options.perplexity_text).is_file()
    assert (CONF.parent / "corpus" / f"{options.corpus}.yaml").is_file()
    assert options.id.startswith("embedded:") == file.stem.startswith("tiny-")


def test_published_settings_belong_to_packaged_models():
    models = {file.stem for file in CONF.glob("*.yaml")}
    assert {file.stem for file in (CONF.parent / "tuned").glob("*/*.yaml")} <= models
    assert {"gpt2-xl", "gpt-j-6b", "llama-3-8b", "hf", "tiny-gpt2"} <= models


def test_the_packaged_prose_is_long_enough_to_measure_perplexity_on():
    text = packaged("embedded:prose.txt").read_text(encoding="utf-8")
    assert 1000 < len(text.split()) < 1500
    assert len(set(text.splitlines())) == 10  # paragraphs, and the empty line between them
