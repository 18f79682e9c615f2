"""Tokenizers of T5's, BART's and BERT's kinds for the invented world.

Like the tiny GPT-2's they learn from a pool of names twenty times as large as the world, so merges follow syllables and
a name that the model never met splits like one that it knows.
"""

from __future__ import annotations

import random
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tools.tiny_world.world import World

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

REPEAT = 60  # of every wording
BEGINNING = "▁"  # of a word


def learning_texts(world: World, wordings: Mapping[str, Sequence[str]]) -> list[str]:
    """Wordings (relation id → sentences with a slot) about names of the pool, every object often, and all names."""
    rng = random.Random(f"{world.seed} vocabulary")
    texts: list[str] = []
    for relation in world.relations:
        names = world.name_pool[relation.kind]
        texts += [wording.replace("{}", rng.choice(names)) for wording in wordings[relation.id] for _ in range(REPEAT)]
        texts += [answer for answer in relation.objects] * 1000
    return texts + [name for names in world.name_pool.values() for name in names]


def t5_tokenizer(texts: Iterable[str], vocabulary: int, context: int) -> PreTrainedTokenizerFast:
    """Words begin with ▁; a text ends with </s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    words = pre_tokenizers.Metaspace(prepend_scheme="always")
    inner.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.Punctuation("isolated")])
    inner.decoder = decoders.Metaspace(prepend_scheme="always")
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    inner.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[*special.values()], show_progress=False)
    )
    return _finished(inner, "$A </s>", "$A </s> $B </s>", special, context)


def bart_tokenizer(texts: Iterable[str], vocabulary: int, context: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, a text between <s> and </s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[*special.values()], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(texts, trainer)
    return _finished(inner, "<s> $A </s>", "<s> $A </s> </s> $B </s>", special, context)


def bert_tokenizer(texts: Iterable[str], vocabulary: int, context: int) -> PreTrainedTokenizerFast:
    """Pieces of lower-case words, a text between [CLS] and [SEP].

    The pieces come from a BPE that marks the beginnings of words: the library's trainer for word pieces gives other
    ones every time.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    special = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.BertNormalizer(lowercase=True)
    words = pre_tokenizers.Metaspace(prepend_scheme="always")
    learner.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.Punctuation("isolated")])
    learner.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocabulary, show_progress=False))
    learned = learner.get_vocab()
    letters = sorted(
        {letter for piece in learned for letter in piece} - {BEGINNING} | set(string.digits + string.punctuation)
    )
    pieces = [*special.values(), *letters, *(f"##{letter}" for letter in letters)]
    pieces += [
        piece[1:] if piece.startswith(BEGINNING) else f"##{piece}" for piece in sorted(learned, key=learned.__getitem__)
    ]
    chosen = [piece for piece in dict.fromkeys(pieces) if piece][:vocabulary]
    inner = Tokenizer(models.WordPiece({piece: number for number, piece in enumerate(chosen)}, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    return _finished(inner, "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", special, context)


def _finished(inner: Tokenizer, single: str, pair: str, special: dict[str, str], context: int) -> Any:
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    around = [(token, inner.token_to_id(token)) for token in special.values() if token in single]
    inner.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=around)
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=context, **special)
