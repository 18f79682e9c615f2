"""A T5 of transformers that translates between the two invented languages, and the records that edits are about."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from tools.tiny_translation.languages import RARE, Languages, Pair, languages, sentences
from tools.tiny_world.assets import replace_folder, save_model, write_json

SPLITS = {"train": 800, "validation": 150, "test": 250}  # records
ROWS = 64
LR = 5e-3
WARM_UP = 100  # steps
SPECIAL = ("<pad>", "</s>", "<unk>")
CONTEXT = 32

Report = Callable[[int, float], None]


def make_translator(out: Path, seed: int, steps: int, command: str, report: Report) -> dict[str, Any]:
    """Write `out`/tiny-translator and `out`/translation. Returns the manifest."""
    from edit_cli.lm.loading import ModelOptions

    torch.manual_seed(seed)
    spoken = languages(seed)
    records = edits(spoken, seed)
    tokenizer = new_tokenizer(spoken)
    model = new_translator(len(tokenizer))
    train(model, tokenizer, spoken, {pair.source for _, pair in records}, seed, steps, report)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".making-") as folder:
        staged, told = Path(folder) / "tiny-translator", Path(folder) / "translation"
        save_model(model, tokenizer, staged)
        told.mkdir()
        lines = [
            {"id": f"{split}-{i}", "split": split, "source": p.source, "reference": p.reference, "wanted": p.wanted}
            for i, (split, p) in enumerate(records)
        ]
        (told / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        manifest: dict[str, Any] = {"command": command, "seed": seed}
        manifest["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        lm = ModelOptions(name=staged.name, id=str(staged), device="cpu").load()
        manifest["right_percent"] = {split: _right(lm, records, split) for split in SPLITS}
        write_json(staged / "manifest.json", manifest, indent=2)
        for made in (staged, told):
            replace_folder(made, out / made.name)
    return manifest


def edits(spoken: Languages, seed: int) -> list[tuple[str, Pair]]:
    """(split, sentence) of those with a rarer word to want; no sentence twice."""
    found: dict[str, Pair] = {}
    for pair in sentences(spoken, seed, rare=0.0):
        if pair.wanted is not None:
            found.setdefault(pair.source, pair)
        if len(found) == sum(SPLITS.values()):
            break
    pairs = iter(found.values())
    return [(split, pair) for split, count in SPLITS.items() for pair in islice(pairs, count)]


def new_tokenizer(spoken: Languages) -> Any:
    """Every form of a word is a token; a text ends with </s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *spoken.words))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = dict(zip(("pad_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=CONTEXT, **names)


def new_translator(vocabulary: int) -> Any:
    """An untrained model."""
    from transformers import T5Config, T5ForConditionalGeneration

    special: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    config = T5Config(
        vocab_size=vocabulary, d_model=64, d_kv=16, d_ff=128, num_layers=3, num_decoder_layers=3, num_heads=4,
        dropout_rate=0.0, **special,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def train(
    model: Any, tokenizer: Any, spoken: Languages, left_out: set[str], seed: int, steps: int, report: Report
) -> None:
    """Minimize the cross-entropy of translations of fresh sentences, none of them `left_out`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / WARM_UP, 1 - step / steps))
    fresh = (pair for pair in sentences(spoken, seed + 1, RARE) if pair.source not in left_out)
    model.train()
    for step in range(1, steps + 1):
        batch = list(islice(fresh, ROWS))
        read = tokenizer([pair.source for pair in batch], padding=True, return_tensors="pt")
        labels = tokenizer([pair.reference for pair in batch], padding=True, return_tensors="pt")["input_ids"]
        labels[labels == tokenizer.pad_token_id] = -100
        loss = model(input_ids=read["input_ids"], attention_mask=read["attention_mask"], labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        report(step, loss.item())
    model.eval()


def _right(lm: Any, records: Sequence[tuple[str, Pair]], split: str) -> float:
    """The share of a split's sentences, in percent, that are translated word by word as their references."""
    pairs = [pair for own, pair in records if own == split]
    written = lm.generate([pair.source for pair in pairs], CONTEXT)
    return round(100 * sum(text == pair.reference for text, pair in zip(written, pairs, strict=True)) / len(pairs), 2)
