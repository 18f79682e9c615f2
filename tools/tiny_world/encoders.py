"""Training small models with an encoder: T5 and BART answer questions about the world, BERT judges claims about it.

Every epoch asks for each fact once, in one of the wordings it is trained with. BERT first learns to guess the right
object whatever a claim
names: a label tells one bit about a fact, a guess tells three. Muon for the matrices in the blocks and AdamW for the
rest, as for the tiny GPT-2.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tools.tiny_world.precision import Muon, autocast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WARM_UP = 40  # steps
JUDGING = 2  # last blocks of a classifier, which compare what a claim names with what is true

Report = Callable[[int, int, float], None]


@dataclass(frozen=True)
class EncoderOptions:
    # of the encoder. With one, BART looks facts up in its decoder, where gradients reach; with four, in the encoder
    layers: int = 4
    decoder_layers: int = 2
    width: int = 128
    inner: int = 512
    heads: int = 4
    context: int = 128
    epochs: int = 50
    batch_rows: int = 96
    muon_lr: float = 0.01  # for the matrices of the blocks
    adam_lr: float = 3e-3  # for embeddings, norms and biases
    weight_decay: float = 0.1
    initial_std: float = 0.06
    end_loss: float = 0.1  # weight of the end token beside the answer's own
    # that the first epochs are about, over and over: with few facts it learns sooner what a fact is
    first_facts: int = 300
    first_epochs: int = 8
    judging_epochs: int = 6  # of a classifier's last blocks
    judging_muon_lr: float = 0.004
    named_loss: float = 0.3  # weight of what a claim names beside what is true
    seed: int = 0


# Where a kind differs. BERT normalizes after every addition: with larger steps it forgets the first facts and learns no
# others.
RECIPES: dict[str, dict[str, Any]] = {
    "t5": {},
    "bart": {},
    "bert": {"muon_lr": 0.003, "adam_lr": 2e-3, "first_facts": 200, "first_epochs": 4},
}


@dataclass(frozen=True)
class Question:
    """The wordings of one fact and their answer."""

    wordings: tuple[str, ...]
    answer: str


def optimizers(model: nn.Module, options: EncoderOptions) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks (lists of modules), AdamW for everything else."""
    blocks = {id(p) for module in model.modules() if isinstance(module, nn.ModuleList) for p in module.parameters()}
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    learned = [p for p in model.parameters() if p.requires_grad]
    inside = [p for p in learned if id(p) in blocks - embeddings and p.ndim == 2]
    outside = [p for p in learned if id(p) not in {id(x) for x in inside}]
    return [
        Muon(inside, lr=options.muon_lr, weight_decay=options.weight_decay),
        torch.optim.AdamW(outside, lr=options.adam_lr, weight_decay=options.weight_decay, betas=(0.9, 0.95)),
    ]


def batches(lengths: Sequence[int], rows: int, rng: random.Random) -> Iterator[list[int]]:
    """Indices in batches of similar length, in random order."""
    order = sorted(rng.sample(range(len(lengths)), len(lengths)), key=lambda i: lengths[i])
    cut = [order[i : i + rows] for i in range(0, len(order), rows)]
    yield from rng.sample(cut, len(cut))


def epoch_facts(count: int, epoch: int, options: EncoderOptions) -> list[int]:
    """Which facts an epoch is about: all of them, or in the first epochs a few, over and over."""
    facts = list(range(count))
    if epoch >= options.first_epochs:
        return facts
    few = random.Random(f"{options.seed} first").sample(facts, min(options.first_facts, count))
    return (few * (count // len(few) + 1))[:count]


def padded(rows: Sequence[Sequence[int]], pad: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])


def fit(
    model: nn.Module,
    epoch: Callable[[random.Random, int], Iterator[Tensor]],
    options: EncoderOptions,
    steps: int,
    report: Report,
) -> None:
    """Minimize the losses that each `epoch` (by number) yields, with a linear warm-up and a linear decay over
    `steps`.
    """
    rng, step = random.Random(f"{options.seed} batches"), 0
    optimizer_list = optimizers(model, options)
    model.train()
    for number in range(options.epochs):
        for loss in epoch(rng, number):
            rate = min(1.0, (step + 1) / WARM_UP) * max(1 - step / steps, 0.01)
            for optimizer, peak in zip(optimizer_list, (options.muon_lr, options.adam_lr), strict=True):
                optimizer.param_groups[0]["lr"] = peak * rate
            loss.backward()
            for optimizer in optimizer_list:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            report(step, steps, float(loss.detach()))
    model.eval()


def train_seq2seq(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[Question],
    options: EncoderOptions,
    report: Report = lambda *_: None,
) -> None:
    """Teach a model to answer; the decoder is fed and scored as `edit_cli.lm.heads.seq2seq` does."""
    encoded = [tokenizer(list(question.wordings))["input_ids"] for question in questions]
    answers = tokenizer(text_target=[question.answer for question in questions])["input_ids"]
    pad, start, end = tokenizer.pad_token_id, model.config.decoder_start_token_id, tokenizer.eos_token_id
    unscored = [token for token in (pad, tokenizer.bos_token_id) if token is not None]

    def one_epoch(rng: random.Random, number: int) -> Iterator[Tensor]:
        facts = epoch_facts(len(encoded), number, options)
        chosen = [rng.choice(encoded[fact]) for fact in facts]
        for batch in batches([len(ids) for ids in chosen], options.batch_rows, rng):
            ids, target = padded([chosen[i] for i in batch], pad), padded([answers[facts[i]] for i in batch], pad)
            fed = torch.cat([torch.full((len(batch), 1), start), target[:, :-1]], dim=1)
            with autocast():
                logits = model(
                    input_ids=ids, attention_mask=(ids != pad).long(), decoder_input_ids=fed, use_cache=False
                ).logits
            weight = torch.where(target == end, options.end_loss, 1.0) * ~torch.isin(target, torch.tensor(unscored))
            losses = F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="none")
            yield (losses * weight.flatten()).sum() / weight.sum()

    fit(model, one_epoch, options, options.epochs * -(-len(questions) // options.batch_rows), report)


@dataclass(frozen=True)
class Claim:
    """Statements that end right before their object, the true one, and others that would be false."""

    wordings: tuple[str, ...]
    object: str
    others: tuple[str, ...]


def train_classifier(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    claims: Sequence[Claim],
    options: EncoderOptions,
    report: Report = lambda *_: None,
) -> None:
    """Teach a BERT which claims are true (label 1), in two stages: a label alone teaches hardly anything about facts.

    The blocks below the last ones learn the facts: whatever object a claim names, at the first token they guess the
    right one, and at the object's own place they keep the one that is named. Then the last blocks learn to compare the
    two, from a true and a false claim about each fact.
    """
    pad = tokenizer.pad_token_id
    objects = [tokenizer(claim.object, add_special_tokens=False)["input_ids"][0] for claim in claims]
    after = len(tokenizer(".")["input_ids"]) - 1  # tokens from the object's on, without it: full stop and end
    told = [
        {
            answer: tokenizer([f"{text} {answer}." for text in claim.wordings])["input_ids"]
            for answer in (claim.object, *claim.others)
        }
        for claim in claims
    ]
    base, judging = model.base_model, min(JUDGING, options.layers - 1)
    blocks = base.encoder.layer
    last = blocks[-judging:]

    def know(rng: random.Random, number: int) -> Iterator[Tensor]:
        """An epoch about what is true; each object is named as often as any other, so that it tells nothing."""
        facts = epoch_facts(len(claims), number, options)
        rows = [rng.choice(told[fact][rng.choice([*told[fact]])]) for fact in facts]
        for batch in batches([len(row) for row in rows], options.batch_rows, rng):
            ids = padded([rows[i] for i in batch], pad)
            places = torch.tensor([len(rows[i]) - 1 - after for i in batch])
            named, right = ids[torch.arange(len(batch)), places], torch.tensor([objects[facts[i]] for i in batch])
            with autocast():
                states = base(input_ids=ids, attention_mask=(ids != pad).long()).last_hidden_state
                scores = (
                    torch.stack([states[:, 0], states[torch.arange(len(batch)), places]])
                    @ model.get_input_embeddings().weight.T
                )
            yield F.cross_entropy(scores[0].float(), right) + options.named_loss * F.cross_entropy(
                scores[1].float(), named
            )

    def judge(rng: random.Random, _: int) -> Iterator[Tensor]:
        """An epoch of pairs, a true claim and a false one in the same wording."""
        pairs = []
        for claim, own in zip(claims, told, strict=True):
            wording = rng.randrange(len(claim.wordings))
            pairs.append((own[claim.object][wording], own[rng.choice(claim.others)][wording]))
        for batch in batches([len(true) for true, _ in pairs], options.batch_rows // 2, rng):
            ids = padded([row for i in batch for row in pairs[i]], pad)
            with autocast():
                logits = model(input_ids=ids, attention_mask=(ids != pad).long()).logits
            labels = torch.tensor([1, 0] * len(batch))
            true, false = (logits[:, 1] - logits[:, 0]).float().view(-1, 2).T
            yield F.cross_entropy(logits.float(), labels) + F.softplus(false - true).mean()

    base.encoder.layer = blocks[:-judging]
    fit(model, know, options, options.epochs * -(-len(claims) // options.batch_rows), report)
    base.encoder.layer = blocks
    model.requires_grad_(False)
    for part in (last, base.pooler, model.classifier):
        part.requires_grad_(True)
    for block in last:  # what is alike attends to each other from the first: to compare is then soon learned
        block.attention.self.key.weight.data.copy_(block.attention.self.query.weight.data)
    options = replace(options, epochs=options.judging_epochs, muon_lr=options.judging_muon_lr)
    fit(model, judge, options, options.epochs * -(-len(claims) // (options.batch_rows // 2)), report)
    model.requires_grad_(True)
