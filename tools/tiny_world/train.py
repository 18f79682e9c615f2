"""Training a small GPT-2, or Llama, whose facts sit at the subject's last token.

A small model trained in the ordinary way reads a subject's name wherever it needs it, and no single place holds its
facts: editors that write at the subject's last token then have nothing to overwrite. So most rows are read through a
bottleneck:

* tokens after a subject never attend to any but its last token,
* and to that one only from block `bottleneck` on.

What the model knows about a subject must therefore be looked up in the blocks below, at the subject's last token. The
rest of the rows, and inference, have no mask. The localization is built in by this mask: it says nothing about models
at large.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tools.tiny_world.precision import Muon, autocast
from tools.tiny_world.statements import NO_SUBJECT, Batches, Text
from tools.tiny_world.training_state import EVERY, TrainingState

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BLOCKED = -1e9
WARM_UP = 20  # steps


@dataclass(frozen=True)
class TrainOptions:
    family: Literal["gpt2", "llama"] = "gpt2"
    layers: int = 6
    width: int = 128
    heads: int = 4
    context: int = 256
    bottleneck: int = 4  # the first block that may read a subject's last token from later positions
    masked_share: float = 0.85  # of the rows
    epochs: int = 52
    batch_rows: int = 16
    row_tokens: int = 64
    muon_lr: float = 0.01  # for the matrices of the blocks
    adam_lr: float = 3e-3  # for embeddings, norms and biases
    weight_decay: float = 0.1
    initial_std: float = 0.06
    other_loss: float = 0.25  # share of the tokens outside targets that count in the loss
    seed: int = 0


def new_model(options: TrainOptions, tokenizer: PreTrainedTokenizerFast) -> Any:
    """An untrained model of that size, without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(options.seed)
    if options.family == "llama":
        return LlamaForCausalLM(
            LlamaConfig(  # type: ignore[call-arg]
                vocab_size=len(tokenizer),
                max_position_embeddings=options.context,
                hidden_size=options.width,
                intermediate_size=3 * options.width,  # of three matrices, where GPT-2 has 4 times the width in two
                num_hidden_layers=options.layers,
                num_attention_heads=options.heads,
                tie_word_embeddings=True,
                initializer_range=options.initial_std,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                attn_implementation="eager",
            )
        )
    config = GPT2Config(  # type: ignore[call-arg]  # all configurations take attn_implementation
        vocab_size=len(tokenizer),
        n_positions=options.context,
        n_embd=options.width,
        n_layer=options.layers,
        n_head=options.heads,
        activation_function="gelu_pytorch_tanh",  # the same function as gelu_new, fused
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=options.initial_std,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",
    )
    return GPT2LMHeadModel(config)


def attention_masks(left: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
    """Additive masks (rows, 1, tokens, tokens) for the blocks below and from the bottleneck on.

    `left` (rows, tokens) counts the tokens that remain in the subject, NO_SUBJECT outside; `masked` (rows,) says which
    rows have the bottleneck.
    """
    tokens = left.shape[1]
    position = torch.arange(tokens)
    causal = position[:, None] >= position[None, :]
    last = position[None, :] + left  # of the subject that a key position belongs to
    after = position[None, :, None] > last[:, None, :]  # (rows, query, key)
    named = masked[:, None] & (left != NO_SUBJECT)
    upper = causal & ~(after & (named & (left > 0))[:, None, :])
    lower = causal & ~(after & named[:, None, :])
    return tuple(torch.where(allowed, 0.0, BLOCKED)[:, None] for allowed in (lower, upper))  # type: ignore[return-value]


def hidden_states(model: Any, ids: Tensor, lower: Tensor, upper: Tensor, bottleneck: int) -> Tensor:
    """The forward pass up to the final norm, (rows, tokens, width), with a mask for either side of the bottleneck."""
    positions = torch.arange(ids.shape[1])
    if model.config.model_type == "llama":
        body = model.model
        hidden, blocks, norm = body.embed_tokens(ids), body.layers, body.norm
        turned = {"position_embeddings": body.rotary_emb(hidden, positions[None])}
    else:
        body = model.transformer
        hidden, blocks, norm, turned = body.wte(ids) + body.wpe(positions), body.h, body.ln_f, {}
    for index, block in enumerate(blocks):
        hidden = block(hidden, attention_mask=lower if index < bottleneck else upper, **turned)
    return norm(hidden)


def optimizers(model: nn.Module, options: TrainOptions) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for everything else: several times faster to learn facts than
    AdamW alone.
    """
    blocks = ".layers." if options.family == "llama" else ".h."
    inside = [p for name, p in model.named_parameters() if blocks in name and p.ndim == 2]
    outside = [p for name, p in model.named_parameters() if not (blocks in name and p.ndim == 2)]
    decay = options.weight_decay
    return [
        Muon(inside, lr=options.muon_lr, weight_decay=decay),
        torch.optim.AdamW(outside, lr=options.adam_lr, weight_decay=decay, betas=(0.9, 0.95)),
    ]


def train(
    tokenizer: PreTrainedTokenizerFast,
    text: Text,
    options: TrainOptions,
    report: Callable[[int, int, float], None] = lambda step, steps, loss: None,
    state: TrainingState | None = None,
) -> Any:
    """Train from scratch; `report` is told after every step. Deterministic for a seed and a number of threads.

    state: where the training is kept meanwhile, and taken up after a kill.
    """
    model = new_model(options, tokenizer)
    batches = Batches(text, tokenizer, options.batch_rows, options.row_tokens, options.seed)
    rng = torch.Generator().manual_seed(options.seed)
    optimizer_list = optimizers(model, options)
    queue = [batch for _ in range(options.epochs) for batch in batches.epoch()]
    done = state.resume(model, optimizer_list, rng) if state else 0
    for step, batch in enumerate(queue[done:], start=done):
        rate = min(1.0, (step + 1) / WARM_UP) * (1 - step / len(queue))
        for optimizer, peak in zip(optimizer_list, (options.muon_lr, options.adam_lr), strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate
        loss = _loss(model, torch.from_numpy(batch.astype(np.int64)), options, rng, tokenizer.pad_token_id)
        loss.backward()
        for optimizer in optimizer_list:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        report(step + 1, len(queue), float(loss.detach()))
        if state and (step + 1) % EVERY == 0:
            state.save(step + 1, model, optimizer_list, rng)
    return model.eval()


def _loss(model: Any, batch: Tensor, options: TrainOptions, rng: torch.Generator, pad: int) -> Tensor:
    """Cross-entropy on every target token and on a random share of the others; logits are formed for these only."""
    ids, left, target = batch.unbind(1)
    masked = torch.rand(len(ids), generator=rng) < options.masked_share
    lower, upper = attention_masks(left, masked)
    labels = ids[:, 1:]
    counted = target[:, 1:].bool() | (torch.rand(labels.shape, generator=rng) < options.other_loss)
    counted &= labels != pad
    with autocast():
        hidden = hidden_states(model, ids, lower, upper, options.bottleneck)[:, :-1][counted]
        logits = model.lm_head(hidden)
    return F.cross_entropy(logits.float(), labels[counted])


@torch.no_grad()
def recalled(
    model: Any, tokenizer: PreTrainedTokenizerFast, pairs: Sequence[tuple[str, str]], batch: int = 64
) -> list[bool]:
    """For each (prompt, answer): is every token of " answer" the arg-max after the prompt (teacher-forced)?"""
    asked = tokenizer([prompt for prompt, _ in pairs])["input_ids"]
    wholes = tokenizer([f"{prompt} {answer}" for prompt, answer in pairs])["input_ids"]
    answers = [len(whole) - len(prompt) for whole, prompt in zip(wholes, asked, strict=True)]
    wholes = [whole[-model.config.max_position_embeddings :] for whole in wholes]
    order = sorted(range(len(pairs)), key=lambda index: len(wholes[index]))
    result = [False] * len(pairs)
    for first in range(0, len(order), batch):
        chosen = order[first : first + batch]
        longest = max(len(wholes[index]) for index in chosen)
        ids = torch.full((len(chosen), longest), tokenizer.pad_token_id)
        for row, index in enumerate(chosen):
            ids[row, : len(wholes[index])] = torch.tensor(wholes[index])
        best = model(ids, attention_mask=(ids != tokenizer.pad_token_id).long()).logits.argmax(-1)
        for row, index in enumerate(chosen):
            end = len(wholes[index])
            start = end - answers[index]
            result[index] = torch.equal(best[row, start - 1 : end - 1], ids[row, start:end])
    return result
