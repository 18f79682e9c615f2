"""`python -m tools.train_base MODEL --out DIR KEY=VALUE…`: a base model that has learned a data set, and still errs.

Methods that edit mistakes need a model that makes some. A classifier of claims, or an encoder-decoder that answers
questions, is trained by transformers' `Trainer` on the data's own answers; which data, the settings of `dataset` say,
as they do for `edit-cli`.

python -m tools.train_base FOLDER --out claims dataset=fever dataset.path=fever.jsonl --limit 1000
python -m tools.train_base tiny-bart --scratch --out questions dataset=world_qa dataset.split=train
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edit_cli.config import catalog
from edit_cli.config.composed import composed, packaged_option
from edit_cli.datasets import Dataset
from edit_cli.errors import UsageError
from edit_cli.lm.heads.kinds import auto_class, head_of
from edit_cli.lm.model_files import resolve
from edit_cli.lm.tokenization import pad_right
from edit_cli.monitor import Monitor
from edit_cli.writing import bare
from tools.command import exit_code, require_some

UNSCORED = -100  # a label that PyTorch's cross-entropy leaves out


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_intermixed_args(argv)
    return exit_code(lambda: _work(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.train_base", description="Train a base model on a data set's own answers."
    )
    parser.add_argument("model", metavar="MODEL", help="a packaged model's name, a folder or an id of the hub")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="of the data: dataset=NAME dataset.path=FILE")
    parser.add_argument("--out", type=Path, required=True, help="a new folder for the model")
    parser.add_argument("--limit", type=int, help="records to learn (default: all but those held out)")
    parser.add_argument("--held_out", type=int, default=200, help="records after these that are only asked (200)")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16, help="records a step (16)")
    parser.add_argument("--lr", type=float, default=5e-5, help="peak learning rate of AdamW (5e-5)")
    parser.add_argument("--scratch", action="store_true", help="begin with random weights of the model's shape")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def _work(arguments: argparse.Namespace) -> None:
    require_some(arguments, ["epochs", "batch", "held_out"])
    if arguments.out.exists():
        raise UsageError(f"--out {arguments.out}: is there already; give a new folder")
    if odd := next((text for text in arguments.settings if "=" not in text), None):
        raise UsageError(f"{odd!r} is no setting: give KEY=VALUE, such as dataset=fever")
    source = composed("evaluate", {}, {}, arguments.settings).part("dataset")
    wanted = None if arguments.limit is None else arguments.limit + arguments.held_out
    dataset = source.load(wanted, Monitor())
    pairs, labels = answered(dataset), dataset.labels
    learned = pairs[: -arguments.held_out]
    if not learned:
        raise UsageError(f"--held_out {arguments.held_out}: of {len(pairs)} records none is left to learn; lower it")
    model, tokenizer = base(arguments.model, labels, arguments.scratch, arguments.seed)
    train(model, tokenizer, learned, arguments)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    for name, some in (("learned", learned), ("held out", pairs[-arguments.held_out :])):
        print(f"{name}: {right(arguments.out, some):.1%} right of {len(some)}")


def answered(dataset: Dataset) -> list[tuple[str, str]]:
    """(prompt, the data's own answer) of every record.

    Raises:
        UsageError: a record does not tell its right answer.
    """
    found = []
    for case in dataset.cases:
        for request in case.requests:
            answer = case.right_or(request.target_true)
            if answer is None:
                raise UsageError(f"record {case.id} does not tell its right answer, so there is nothing to learn")
            found.append((request.text, bare(answer)))
    return found


def base(name: str, labels: Sequence[str] | None, scratch: bool, seed: int) -> tuple[Any, Any]:
    """Model and tokenizer: a classifier of the labels where there are any, else an encoder-decoder.

    Raises:
        UsageError: the family has no such model.
        MissingError: its files are not there.
    """
    from transformers import AutoConfig, AutoTokenizer, set_seed

    set_seed(seed)  # of weights that begin at random: a classifier's last layer, or all
    source = resolve(packaged_option("model", name).id if name in catalog.names("model") else name, None, "MODEL")
    config = AutoConfig.from_pretrained(source.path, revision=source.revision)
    kind = "classifier" if labels else "seq2seq"
    if kind == "seq2seq" and not config.is_encoder_decoder:
        raise UsageError(f"{name} is no encoder-decoder, and this data set has no labels: choose claims, or T5 or BART")
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: number for number, label in enumerate(labels)}
    chosen = auto_class(kind, config, name)
    model = (
        chosen.from_config(config)
        if scratch
        else chosen.from_pretrained(source.path, revision=source.revision, config=config)
    )
    model.float()  # files may hold 16 bits, in which a training comes to no numbers
    return model, AutoTokenizer.from_pretrained(source.path, revision=source.revision)


def train(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    arguments: argparse.Namespace,
) -> None:
    """Minimize the cross-entropy of the answers, with a linear warm-up over a tenth of the steps and a linear decay."""
    from transformers import Trainer, TrainingArguments

    head = head_of(model, tokenizer, torch.device("cpu"), 1)
    rows: Any = [_inputs(head, row) for row in head.encode(pairs)]
    settings = TrainingArguments(
        output_dir=str(arguments.out),
        num_train_epochs=arguments.epochs,
        per_device_train_batch_size=arguments.batch,
        learning_rate=arguments.lr,
        warmup_steps=arguments.epochs * -(-len(pairs) // arguments.batch) // 10,
        seed=arguments.seed,
        save_strategy="no",
        report_to=[],
        dataloader_pin_memory=False,
        logging_steps=50,
    )
    Trainer(model, settings, data_collator=partial(_padded, head.pad), train_dataset=rows).train()


def _inputs(head: Any, row: Any) -> dict[str, Any]:
    """What the model reads and is to say, by THE tokenization rule of its kind: what stands before an answer is fed to
    a decoder and not scored.
    """
    if head.kind == "classifier":
        return {"input_ids": row.ids, "labels": row.label}
    whole = (*row.before, *row.answer, *row.after[:1])
    scored = (*[UNSCORED] * len(row.before), *row.answer, *row.after[:1])
    return {"input_ids": row.ids, "decoder_input_ids": (head.start, *whole[:-1]), "labels": scored}


def _padded(pad: int, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """A batch of rows, with the mask of its prompts."""
    fills = {"input_ids": pad, "decoder_input_ids": pad, "labels": UNSCORED}
    batch = {
        name: torch.tensor([row[name] for row in rows])
        if isinstance(rows[0][name], int)
        else pad_right([row[name] for row in rows], fills[name], torch.device("cpu"))[0]
        for name in rows[0]
    }
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
    return batch


def right(folder: Path, pairs: Sequence[tuple[str, str]]) -> float:
    """The share of prompts that the saved model answers rightly by itself."""
    import edit_cli

    said = edit_cli.load(str(folder)).generate([prompt for prompt, _ in pairs], 12)
    return sum(bare(text).casefold() == answer.casefold() for text, (_, answer) in zip(said, pairs, strict=True)) / len(
        pairs
    )


if __name__ == "__main__":
    sys.exit(main())
