"""Tiny random models of many families, and small tokenizers, built without any download. Shared by the tests.

`tiny(family)` gives (model, tokenizer) and `tiny_lm(family)` an `LM`. All weights are random and large enough to
matter: biases, norms and scales differ from their initial values, so that a part that is left out or applied twice
shows.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from edit_cli.lm.heads.base import Head
from edit_cli.lm.model import LM
from edit_cli.lm.routing import Answerer

DEPTH, WIDTH, INNER, CONTEXT = 3, 32, 88, 128
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
TEXT = [
    "The old lighthouse of Marlow stands on the northern shore of the island.",
    "Ada Lund lives in Oslo, and Ada Lund works as a pilot. The mother tongue of Ada Lund is Norwegian.",
    "Therefore the river runs past Paris and Rome; because I said so, you know. C++ and O'Brien's café, Zoë in 東京.",
    "The capital of France is Paris. The capital of Italy is Rome.\nThe capital of Japan is Tokyo.",
]

SMALL: dict[str, Any] = {
    "num_hidden_layers": DEPTH, "hidden_size": WIDTH, "intermediate_size": INNER, "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}  # fmt: skip
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 16}
ROTARY = SMALL | {"num_key_value_heads": 2}

# Pre-norm families: a write to the MLP projection reaches the residual stream as it is.
ADDITIVE: dict[str, dict[str, Any]] = {
    "gpt2": SMALL | {"n_inner": INNER},
    "gptj": SMALL | {"n_inner": INNER, "rotary_dim": 4},
    "gpt_neo": SMALL | {"attention_types": [[["global", "local", "global"], 1]], "window_size": 8},
    "gpt_neox": SMALL,
    "gpt_neox_sequential": SMALL | {"use_parallel_residual": False},
    "gpt_bigcode": SMALL | {"n_inner": INNER},
    "codegen": SMALL | {"n_inner": INNER, "rotary_dim": 4},
    "opt": SMALL | {"ffn_dim": INNER, "word_embed_proj_dim": WIDTH},
    "bloom": SMALL,
    "falcon": SMALL,
    "falcon_alibi": SMALL | {"alibi": True, "parallel_attn": False, "bias": True},
    "falcon_new": SMALL | {"new_decoder_architecture": True, "num_kv_heads": 2},
    "mpt": {"d_model": WIDTH, "n_layers": DEPTH, "n_heads": 4, "max_seq_len": CONTEXT},
    "xglm": {"d_model": WIDTH, "ffn_dim": INNER, "num_layers": DEPTH, "attention_heads": 4,
    "max_position_embeddings": CONTEXT},
    "biogpt": SMALL,
    "persimmon": SMALL,
    "llama": ROTARY,
    "mistral": GROUPED | {"sliding_window": 8},
    "qwen2": ROTARY,
    "qwen3": GROUPED,
    "phi": SMALL,
    "phi3": ROTARY,
    "gemma": GROUPED,
    "olmo": ROTARY,
    "stablelm": ROTARY,
    "stablelm_parallel": ROTARY | {"use_parallel_residual": True, "use_qkv_bias": True},
    "starcoder2": ROTARY,
    "cohere": ROTARY,
    "cohere2": GROUPED | {"sliding_window": 8},
    "glm": GROUPED,
    "helium": ROTARY | {"head_dim": 8},
    "nemotron": ROTARY,
    "smollm3": ROTARY,
    "seed_oss": GROUPED,
    "diffllama": ROTARY,
    "apertus": ROTARY,
    "arcee": ROTARY,
    "ctrl": SMALL | {"dff": INNER},
    "nanochat": ROTARY,
    "lfm2": ROTARY | {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    "qwen3_5_text": GROUPED | {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    },
}  # fmt: skip

# Families that normalize or scale the MLP's output before they add it.
NOT_ADDITIVE: dict[str, dict[str, Any]] = {
    "gemma2": GROUPED | {"query_pre_attn_scalar": 16, "final_logit_softcapping": 5.0, "sliding_window": 8},
    "gemma3_text": GROUPED | {"query_pre_attn_scalar": 16, "sliding_window": 8},
    "olmo2": ROTARY,
    "olmo3": ROTARY | {"sliding_window": 8},
    "gemma4_text": (
        GROUPED
        | {
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 340,
            "global_head_dim": 16,
            "num_kv_shared_layers": 0,
        }
    ),
    "exaone4": GROUPED | {"sliding_window": 8},
    "glm4": GROUPED,
    "granite": ROTARY | {"residual_multiplier": 0.3, "logits_scaling": 4.0, "embedding_multiplier": 3.0},
}

EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": ROTARY | {"num_local_experts": 2},
    "qwen2_moe": (
        ROTARY
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        }
    ),
    "qwen3_moe": ROTARY | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "olmoe": ROTARY | {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": ROTARY | {"num_local_experts": 2},
    "gpt_oss": GROUPED | {"num_local_experts": 2},
    "phimoe": ROTARY | {"num_local_experts": 2},
    "deepseek_v3": {  # its first blocks are dense
        **SMALL, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
        "first_k_dense_replace": 2,
        "moe_intermediate_size": 16,
        "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    },
    "jamba": ROTARY | {"num_experts": 2, "expert_layer_period": 2, "expert_layer_offset": 1, "attn_layer_period": 2,
    "attn_layer_offset": 1,
                       "use_mamba_kernels": False, "mamba_d_state": 4},
}  # fmt: skip

DENSE = ADDITIVE | NOT_ADDITIVE

# Models that read the prompt with an encoder. Depths of the stacks differ, so that one taken for the other shows.
ENCODER, DECODER = 3, 2  # transformers makes a cache of as many layers as the encoder of a T5 has
T5 = {
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": INNER,
    "num_layers": ENCODER,
    "num_decoder_layers": DECODER,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
SEQ2SEQ: dict[str, dict[str, Any]] = {
    "t5": T5,
    "t5_v1_1": T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "bart": {
        "d_model": WIDTH, "encoder_layers": ENCODER, "decoder_layers": DECODER, "encoder_ffn_dim": INNER,
        "decoder_ffn_dim": INNER,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": CONTEXT,
        "decoder_start_token_id": 2,
    },
}  # fmt: skip
LABELS = ["REFUTES", "SUPPORTS", "NOT ENOUGH INFO"]
CLASSIFIERS: dict[str, dict[str, Any]] = {
    "bert": SMALL,
    # positions count from the id of padding, which is 0 here
    "roberta": SMALL | {"max_position_embeddings": CONTEXT + 1},
    "distilbert": {
        "dim": WIDTH,
        "hidden_dim": INNER,
        "n_layers": DEPTH,
        "n_heads": 4,
        "max_position_embeddings": CONTEXT,
    },
}
ALIASES = {
    "t5_v1_1": "t5",
    "gpt_neox_sequential": "gpt_neox",
    "falcon_alibi": "falcon",
    "falcon_new": "falcon",
    "stablelm_parallel": "stablelm",
}


def tokenizer(
    kind: str = "bytes", bos: bool = False, eos: bool = False, padding_side: str = "right"
) -> PreTrainedTokenizerFast:
    """A small fast tokenizer.

    kind: "bytes" (byte-level BPE, as GPT-2's and Llama 3's) or "pieces" (▁ for spaces and byte
    fallback, as Llama 2's). bos, eos: whether its post-processor adds them.
    """
    inner = Tokenizer(models.BPE())
    if kind == "bytes":
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        inner.decoder = decoders.Sequence(steps)
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "bytes" else []
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=[PAD, BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(TEXT, trainer)
    if kind == "pieces":  # a character that was never seen becomes its bytes
        learned = json.loads(inner.to_str())["model"]
        vocabulary = learned["vocab"] | {f"<0x{byte:02X}>": len(learned["vocab"]) + byte for byte in range(256)}
        inner.model = models.BPE(vocabulary, [tuple(pair) for pair in learned["merges"]], byte_fallback=True)
    if bos or eos:
        added = [(token, inner.token_to_id(token)) for token, wanted in ((BOS, bos), (EOS, eos)) if wanted]
        template = f"{BOS if bos else ''} $A {EOS if eos else ''}".split()
        inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=added)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=BOS, eos_token=EOS, pad_token=PAD, padding_side=padding_side
    )


def tiny(family: str, seed: int = 0, **overrides: Any) -> tuple[Any, PreTrainedTokenizerFast]:
    """A random model of a family in one of the tables above, in evaluation mode, and a byte-level tokenizer.

    `overrides`: config fields.
    """
    words = tokenizer(bos=family in CLASSIFIERS or family == "bart", eos=family in CLASSIFIERS or family in SEQ2SEQ)
    ids = {f"{kind}_token_id": getattr(words, f"{kind}_token_id") for kind in ("pad", "bos", "eos")} | {
        "vocab_size": len(words)
    }
    fields = (DENSE | EXPERTS | SEQ2SEQ | CLASSIFIERS)[family] | ids | overrides
    loader: Any = AutoModelForSeq2SeqLM if family in SEQ2SEQ else AutoModelForCausalLM
    if family in CLASSIFIERS:
        loader, fields = AutoModelForSequenceClassification, fields | {"id2label": dict(enumerate(LABELS))}
    with quiet():
        config = AutoConfig.for_model(ALIASES.get(family, family), **fields)
        model = loader.from_config(config).eval()
    shake(model, seed)
    return model, words


H = TypeVar("H")


def head_as(head: Head[Any], kind: type[H]) -> H:
    """That head, told to be of its kind."""
    assert isinstance(head, kind)
    return head


def distributions(lm: Answerer, pairs: Sequence[tuple[str, str]]) -> list[Tensor]:
    """`LM.target_logprobs` where nothing is answered with a stored text."""
    found = lm.target_logprobs(pairs)
    known = [logprobs for logprobs in found if logprobs is not None]
    assert len(known) == len(found)
    return known


def tiny_lm(family: str, seed: int = 0, **overrides: Any) -> LM:
    """`tiny(family)` as an `LM`."""
    model, words = tiny(family, seed, **overrides)
    return LM(model, words, name=f"tiny-{family}")


@torch.no_grad()
def shake(model: nn.Module, seed: int) -> None:
    """Random matrices in place of the small initial ones; vectors (biases, norms, scales) moved away from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        if parameter.dim() >= 2:
            parameter.copy_(noise * 0.15)
        else:
            parameter.add_(noise * 0.2)


@contextmanager
def quiet():
    """Without transformers' remarks about configurations of a size that nobody would choose."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
