"""Where 40-odd families keep things, what their parts compute, and which models are refused.

All models are tiny and random.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from families import (
    ADDITIVE,
    ALIASES,
    CONTEXT,
    DENSE,
    DEPTH,
    INNER,
    NOT_ADDITIVE,
    SMALL,
    WIDTH,
    quiet,
    shake,
    tiny,
    tiny_lm,
    tokenizer,
)
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2LMHeadModel

from edit_cli.errors import UsageError
from edit_cli.lm.fast.suffix_pass import SuffixForward, SuffixRow
from edit_cli.lm.hooks import hidden_of, on_output
from edit_cli.lm.layout import LayoutOptions, discover
from edit_cli.lm.model import LM
from edit_cli.lm.reading import HookPoint, read

pytestmark = pytest.mark.thin(4)

GPT2 = ("transformer.h", "mlp.c_proj", "transformer.ln_f", INNER)
NEOX = ("gpt_neox.layers", "mlp.dense_4h_to_h", "gpt_neox.final_layer_norm", INNER)
LLAMA = ("model.layers", "mlp.down_proj", "model.norm", INNER)
FALCON = ("transformer.h", "mlp.dense_4h_to_h", "transformer.ln_f", 4 * WIDTH)

# blocks, MLP output projection inside a block, final norm, width of a key; families that are not named here are laid
# out as LLAMA
LAYOUTS = {
    "gpt2": GPT2,
    "gpt_neo": GPT2,
    "gpt_bigcode": GPT2,
    "gptj": ("transformer.h", "mlp.fc_out", "transformer.ln_f", INNER),
    "codegen": ("transformer.h", "mlp.fc_out", "transformer.ln_f", INNER),
    "gpt_neox": NEOX,
    "gpt_neox_sequential": NEOX,
    "bloom": FALCON,
    "falcon": FALCON,
    "falcon_alibi": FALCON,
    "falcon_new": FALCON,
    "opt": ("model.decoder.layers", "fc2", "model.decoder.final_layer_norm", INNER),
    "xglm": ("model.layers", "fc2", "model.layer_norm", INNER),
    "biogpt": ("biogpt.layers", "fc2", "biogpt.layer_norm", INNER),
    "mpt": ("transformer.blocks", "ffn.down_proj", "transformer.norm_f", 4 * WIDTH),
    "ctrl": ("transformer.h", "ffn.2", "transformer.layernorm", INNER),
    "persimmon": ("model.layers", "mlp.dense_4h_to_h", "model.final_layernorm", INNER),
    "phi": ("model.layers", "mlp.fc2", "model.final_layernorm", INNER),
    "nanochat": ("model.layers", "mlp.fc2", "model.norm", INNER),
    "starcoder2": ("model.layers", "mlp.c_proj", "model.norm", INNER),
    "lfm2": ("model.layers", "feed_forward.w2", "model.embedding_norm", INNER),
}

# What a family does to the head's output.
FINISH = {
    "cohere": lambda logits, config: logits * config.logit_scale,
    "cohere2": lambda logits, config: logits * config.logit_scale,
    "granite": lambda logits, config: logits / config.logits_scaling,
    "gemma2": lambda logits, config: (
        config.final_logit_softcapping * torch.tanh(logits / config.final_logit_softcapping)
    ),
    "nanochat": lambda logits, config: (
        config.final_logit_softcapping * torch.tanh(logits / config.final_logit_softcapping)
    ),
}

PAIRS = [
    ("The old lighthouse of Marlow stands on the northern", "shore of the island"),
    ("Ada Lund lives in", "Oslo"),
    ("C", "++"),
]
families = pytest.mark.parametrize("family", DENSE)


@cache
def shared(family: str) -> LM:
    """One model a family; no test here changes it."""
    return tiny_lm(family)


def batch() -> tuple[Tensor, Tensor]:
    """Two rows of 20 tokens and no padding."""
    ids = torch.arange(40).reshape(2, 20) * 7 % 330 + 5
    return ids, torch.ones_like(ids)


def seen_in(lm: LM, modules: list[str], side: str, ids: Tensor, mask: Tensor) -> list[Tensor]:
    """What entered or left modules in a plain, whole forward pass, as (rows, tokens, width)."""
    found: dict[str, Tensor] = {}
    handles = []
    for name in modules:

        def hook(_, args, output=None, name=name):
            found[name] = (args[0] if side == "input" else hidden_of(output)).reshape(*ids.shape, -1)

        register = (
            lm.module(name).register_forward_pre_hook if side == "input" else lm.module(name).register_forward_hook
        )
        handles.append(register(hook))
    with torch.no_grad():
        lm.model(input_ids=ids, attention_mask=mask, use_cache=False)
    for handle in handles:
        handle.remove()
    return [found[name] for name in modules]


@torch.no_grad()
def logits(lm: LM, ids: Tensor, mask: Tensor) -> Tensor:
    return lm.model(input_ids=ids, attention_mask=mask, use_cache=False).logits


@families
def test_layout_is_found(family):
    lm = shared(family)
    blocks, mlp_out, final_norm, inner = LAYOUTS.get(family, LLAMA)
    assert (lm.layout.blocks, lm.layout.mlp(0).out, lm.layout.final_norm) == (blocks, mlp_out, final_norm)
    assert (lm.layout.depth, lm.layout.width) == (DEPTH, WIDTH)
    assert [lm.key_width(layer) for layer in range(DEPTH)] == [inner] * DEPTH
    assert lm.head.max_length == CONTEXT


@families
def test_weight_is_d_out_by_d_in_and_takes_keys_to_values(family):
    lm = shared(family)
    rows = lm.head.encode(PAIRS)
    for layer in (0, DEPTH - 1):
        name = lm.layout.mlp_out(layer)
        keys, values = read(
            lm, rows, [len(row.ids) - 1 for row in rows], [HookPoint(name, "input"), HookPoint(name, "output")]
        )
        assert lm.weight(name).shape == (WIDTH, lm.key_width(layer))
        bias = getattr(lm.module(name), "bias", None)
        computed = keys @ lm.weight(name).T + (0 if bias is None else bias)
        torch.testing.assert_close(computed, values, atol=1e-5, rtol=1e-5)
        assert values.abs().max() > 1e-3


@families
@pytest.mark.parametrize("layer", range(DEPTH))
def test_logits_recomputed_from_what_left_a_block_equal_the_models_own(family, layer):
    lm = shared(family)
    ids, mask = batch()
    (states,) = seen_in(lm, [lm.layout.block(layer)], "output", ids, mask)
    with lm.skipping(layer, states):
        recomputed = logits(lm, ids, mask)
    torch.testing.assert_close(recomputed, logits(lm, ids, mask), atol=1e-4, rtol=0)
    with lm.skipping(layer, states.flip(0)):  # it is these states that count, and not the tokens
        assert (logits(lm, ids, mask) - recomputed).abs().max() > 1e-2


@families
def test_head_of_final_norm_of_the_last_states_equals_the_logits(family):
    lm = shared(family)
    ids, mask = batch()
    (states,) = seen_in(lm, [lm.layout.block(DEPTH - 1)], "output", ids, mask)
    with torch.no_grad():
        plain = lm.model.get_output_embeddings()(hidden_of(lm.module(lm.layout.final_norm)(states)))
    finish = FINISH.get(family, lambda logits, config: logits)
    torch.testing.assert_close(finish(plain, lm.model.config), logits(lm, ids, mask), atol=1e-4, rtol=0)


@families
@pytest.mark.parametrize("layer, site", [(0, "mlp_out"), (0, "block"), (1, "mlp_out"), (DEPTH - 1, "block")])
def test_a_resumed_pass_equals_a_whole_one_with_the_change_inside(family, layer, site):
    lm = shared(family)
    rows = lm.head.encode(PAIRS)
    wanted = [tuple(range(row.start - 1, len(row.ids) - 1)) for row in rows]
    suffixes = [
        SuffixRow(row.ids[:-1], min(at, asked[0]), asked)
        for row, at, asked in zip(rows, (3, 2, 0), wanted, strict=True)
    ]
    module = lm.layout.mlp_out(layer) if site == "mlp_out" else None
    shift = torch.randn(len(rows), WIDTH, generator=torch.Generator().manual_seed(0))

    def change(states, rows, columns):
        moved = states.clone()
        moved[rows, columns] += shift[rows]
        return moved

    with torch.no_grad():
        suffix_forward = SuffixForward(lm, suffixes, layer if module is None else layer - 1)
        resumed, unchanged = (
            suffix_forward.logits(change, module),
            suffix_forward.logits(lambda states, rows, columns: states, module),
        )
    expected, plain = [], []
    for number, suffix in enumerate(suffixes):
        ids = torch.tensor([suffix.ids])
        plain.append(logits(lm, ids, torch.ones_like(ids))[0, list(suffix.wanted)])

        def inside(hidden, number=number, suffix=suffix):
            moved = hidden.clone()
            moved[0, suffix.start] += shift[number]
            return moved

        with on_output(lm.module(module or lm.layout.block(layer)), inside, rows=1):
            expected.append(logits(lm, ids, torch.ones_like(ids))[0, list(suffix.wanted)])
    torch.testing.assert_close(suffix_forward.base, torch.cat(plain), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(unchanged, torch.cat(plain), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(resumed, torch.cat(expected), atol=1e-4, rtol=1e-4)
    assert (resumed - unchanged).abs().max() > 1e-3


@families
def test_every_forward_is_as_before_once_blocks_are_no_longer_skipped(family):
    lm = shared(family)
    ids, mask = batch()
    before = logits(lm, ids, mask)
    with pytest.raises(RuntimeError, match="inside"), lm.skipping(1, torch.zeros(2, 20, WIDTH)):
        raise RuntimeError("inside")
    assert torch.equal(logits(lm, ids, mask), before)


@pytest.mark.parametrize("family, expected", [(f, True) for f in ADDITIVE] + [(f, False) for f in NOT_ADDITIVE])
def test_whether_a_write_to_the_projection_reaches_the_residual_stream_as_it_is(family, expected):
    lm = shared(family)
    assert [lm.writes_are_additive(layer) for layer in range(DEPTH)] == [expected] * DEPTH


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "family, expected", [("gpt2", True), ("llama", True), ("gpt_neox", True), ("gemma2", False), ("granite", False)]
)
def test_additivity_is_told_in_16_bits_too(family, expected, dtype):
    model, words = tiny(family)
    assert LM(model.to(dtype), words).writes_are_additive(1) is expected


@families
def test_reading_equals_a_plain_forward_pass(family):
    lm = shared(family)
    # any order
    points = [
        HookPoint(lm.layout.block(2), "output"),
        HookPoint(lm.layout.mlp_out(0), "input"),
        HookPoint(lm.layout.mlp_out(1), "output"),
    ]
    rows = [*lm.head.encode(PAIRS), lm.head.encode(PAIRS[:1])[0]]
    positions = [4, len(rows[1].ids) - 1, 0, len(rows[3].ids) - 1]
    last, mean = read(lm, rows, positions, points), read(lm, rows, positions, points, reduce="mean")
    for point, at_last, at_mean in zip(points, last, mean, strict=True):
        for row, position, one, averaged in zip(rows, positions, at_last, at_mean, strict=True):
            ids = torch.tensor([row.ids])
            (whole,) = seen_in(lm, [point.module], point.side, ids, torch.ones_like(ids))
            torch.testing.assert_close(one, whole[0, position], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(averaged, whole[0, : position + 1].mean(0), atol=1e-4, rtol=1e-4)


@families
def test_logits_at_positions_equal_those_of_the_whole_batch(family):
    lm = shared(family)
    ids, mask = batch()
    rows, columns = torch.tensor([1, 0, 1, 1]), torch.tensor([19, 3, 0, 0])
    with torch.no_grad():
        some = lm.head.logits_at(ids, mask, rows, columns)
    torch.testing.assert_close(some, logits(lm, ids, mask)[rows, columns], atol=1e-4, rtol=0)


def test_logits_at_positions_of_a_model_that_never_calls_its_head():
    model, words = tiny("gpt2")

    class WeightOnly(GPT2LMHeadModel):
        def forward(self, input_ids, attention_mask, use_cache=False):
            output = self.transformer(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)
            return type("Output", (), {"logits": nn.functional.linear(output[0], self.lm_head.weight)})

    plain, own = LM(model, words), LM(model, words)
    ids, mask = batch()
    rows, columns = torch.tensor([0, 0, 0]), torch.tensor([7, 2, 19])
    with torch.no_grad():
        expected = plain.head.logits_at(ids[:1], mask[:1], rows, columns)
        model.__class__ = WeightOnly
        torch.testing.assert_close(own.head.logits_at(ids[:1], mask[:1], rows, columns), expected)


def test_a_state_space_model_has_no_mlp_to_edit():
    with quiet():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **SMALL, vocab_size=340))
    with pytest.raises(UsageError, match=r"no MLP output projection.*model\.layout\.mlp_out"):
        discover(model)


def test_square_projections_are_oriented_by_type():
    lm = tiny_lm("gpt2", n_inner=WIDTH)
    name = lm.layout.mlp_out(1)
    rows = lm.head.encode(PAIRS)
    keys, values = read(lm, rows, [0, 1, 0], [HookPoint(name, "input"), HookPoint(name, "output")])
    bias, weight = (lm.parameter(f"{name}.{part}") for part in ("bias", "weight"))
    torch.testing.assert_close(keys @ lm.weight(name).T + bias, values, atol=1e-5, rtol=1e-5)
    assert torch.equal(lm.weight(name), weight.T)
    assert torch.equal(shared("llama").weight("lm_head"), shared("llama").model.lm_head.weight)


def test_the_language_model_is_found_beside_a_vision_tower_of_the_same_depth():
    text = SMALL | {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 340, "query_pre_attn_scalar": 16}
    vision = SMALL | {"hidden_size": 16, "image_size": 28, "patch_size": 14}
    with quiet():
        config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
        model = AutoModelForCausalLM.from_config(config).eval()
    shake(model, 0)
    lm = LM(model, tokenizer())
    assert lm.layout.blocks == "model.language_model.layers"
    assert lm.layout.final_norm == "model.language_model.norm"
    assert [score.nll > 0 for score in lm.loglikelihood(PAIRS)] == [True] * 3


def test_overrides_replace_what_discovery_finds():
    model, _ = tiny("llama")
    layout = discover(model, LayoutOptions(mlp_out="self_attn.o_proj", final_norm="model.layers.2"))
    assert layout.mlp_out(1) == "model.layers.1.self_attn.o_proj"
    assert layout.final_norm == "model.layers.2"
    assert layout.blocks == "model.layers"


def test_a_model_without_a_final_norm_takes_its_last_block_for_it():
    """The first GPT normalizes after each branch and has nothing behind its last block."""
    fields = DENSE["gpt2"] | {"vocab_size": 340}
    with quiet():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("openai-gpt", **fields)).eval()
    with pytest.raises(UsageError, match=r"no final norm.*model\.layout\.final_norm"):
        discover(model)
    shake(model, 0)
    lm = LM(model, tokenizer(), layout=LayoutOptions(final_norm="transformer.h.2"))
    assert not lm.writes_are_additive(1)
    assert not lm.head.caches_keys
    ids, mask = batch()
    (states,) = seen_in(lm, [lm.layout.final_norm], "output", ids, mask)
    with lm.skipping(DEPTH - 1, states):
        torch.testing.assert_close(logits(lm, ids, mask), lm.model.get_output_embeddings()(states), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"blocks": "model.nothing"}, r"model\.layout\.blocks=model\.nothing names no module of this model"),
        ({"blocks": "model.norm"}, r"model\.layout\.blocks=model\.norm is no list of blocks"),
        ({"mlp_out": "mlp.c_proj"}, r"model\.layout\.mlp_out=mlp\.c_proj names no module of block 0"),
        ({"mlp_out": "mlp.act_fn"}, r"model\.layout\.mlp_out=mlp\.act_fn is no Linear or Conv1D"),
        ({"final_norm": "norm"}, r"model\.layout\.final_norm=norm names no module of this model"),
    ],
)
def test_wrong_overrides_name_their_key(options, message):
    with pytest.raises(UsageError, match=message):
        discover(shared("llama").model, LayoutOptions(**options))


def test_blocks_that_are_not_alike_are_refused():
    model, _ = tiny("llama")
    model.model.layers[1].mlp = nn.Identity()
    with pytest.raises(UsageError, match=r"mlp\.down_proj names no module of block 1"):
        discover(model)


@pytest.mark.parametrize("layer", [-1, DEPTH])
def test_a_layer_that_does_not_exist_is_named(layer):
    with pytest.raises(UsageError, match=f"layer {layer} does not exist: this model has layers 0 to {DEPTH - 1}"):
        shared("gpt2").layout.mlp_out(layer)


def test_modules_without_one_state_a_token_cannot_be_read():
    lm = shared("gpt2")
    rows = lm.head.encode(PAIRS)
    with pytest.raises(UsageError, match="transformer.wpe of tiny-gpt2"):  # one row for the whole batch
        read(lm, rows, [0, 0, 0], [HookPoint("transformer.wpe", "output")])


def test_every_alias_builds_what_it_says():
    assert {tiny(family)[0].config.model_type for family in ALIASES} == set(ALIASES.values())
    assert not tiny("gpt_neox_sequential")[0].config.use_parallel_residual
    assert len(DENSE) >= 40
