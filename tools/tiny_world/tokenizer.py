"""A byte-level BPE tokenizer of GPT-2's kind, trained on whatever the model will read."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import TYPE_CHECKING

from edit_cli.errors import UsageError
from tools.tiny_world.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
PAD = "<|pad|>"


def train_tokenizer(texts: Iterable[str], vocabulary: int, context: int) -> PreTrainedTokenizerFast:
    """Train on `texts`.

    No token is ever added to a prompt by itself: like GPT-2's, this tokenizer has no automatic BOS.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Tokenizer

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return GPT2Tokenizer(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, unk_token=END, pad_token=PAD, model_max_length=context
    )


def world_texts(world: World, repeat: int = 40) -> list[str]:
    """What the world's tokenizer learns from: every wording, every object often, and the whole pool of names.

    The pool is twenty times as large as the world, so merges follow syllables and not the names that happen to have
    facts. Each name comes up at the start of a text and inside one: byte-level BPE treats these as different words.
    """
    rng = random.Random(f"{world.seed} tokenizer")
    texts = []
    for relation in world.relations:
        names = world.name_pool[relation.kind]
        for template in (relation.templates + relation.generation) * repeat:
            text = f"{template.replace('{}', rng.choice(names))} {rng.choice(relation.objects)}."
            texts += [text, f" {text}"]
        texts += [f" {answer}" for answer in relation.objects] * 1000
    pool = [name for names in world.name_pool.values() for name in names]
    sentences = [world.filler.sentence(rng) for _ in range(4000)]
    return texts + pool + [f" {name}" for name in pool] + sentences + [f" {text}" for text in sentences]


def check_single_tokens(tokenizer: PreTrainedTokenizerFast, world: World) -> None:
    """Raise UsageError when an object of the world is split: the recall of a fact is then no longer one arg-max."""
    objects = dict.fromkeys(answer for relation in world.relations for answer in relation.objects)
    split = [answer for answer in objects if len(tokenizer.encode(f" {answer}")) != 1]
    if split:
        raise UsageError(
            f"objects with several tokens: {', '.join(split)}; enlarge the vocabulary or repeat them more often"
        )
