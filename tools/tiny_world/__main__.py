"""`python -m tools.tiny_world world`, `t5`, `bart`, `bert` and `records FILE`: make the tiny models, or one like them.

python -m tools.tiny_world world --seed 0
python -m tools.tiny_world t5 --seed 0
python -m tools.tiny_world records counterfact.json --limit 3000 --out fact-model
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edit_cli.errors import UsageError
from tools.command import ASSETS, exit_code
from tools.tiny_world.world import POOL_FACTOR

if TYPE_CHECKING:
    from tools.tiny_world.train import TrainOptions

LINE_EVERY_S = 15.0
LARGEST = POOL_FACTOR // 2  # worlds use up to half of the names that the tokenizer knows
ENCODERS = {"t5": (50, 4, 2), "bart": (50, 1, 4), "bert": (28, 6)}  # epochs, blocks, and those of a decoder
# arguments, in a manifest's order
SHOWN = (
    "limit", "vocab", "size", "family", "seed", "epochs", "batch_rows", "width", "layers", "decoder_layers", "threads",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    return exit_code(lambda: _work(arguments))


def _work(arguments: argparse.Namespace) -> None:
    _check(arguments)
    arguments.run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.tiny_world", description="Train tiny models that know given facts."
    )
    commands = parser.add_subparsers(required=True, metavar="world|t5|bart|bert|records")
    world = commands.add_parser("world", help="make the embedded GPT-2 and its invented world")
    world.set_defaults(run=_world)
    encoders = [
        commands.add_parser(kind, help=f"make the embedded {kind.upper()}, which knows the same world")
        for kind in ENCODERS
    ]
    for kind, command in zip(ENCODERS, encoders, strict=True):
        command.set_defaults(run=_encoder, kind=kind)
        command.add_argument(
            "--out", type=Path, default=ASSETS, help=f"folder for tiny-{kind}/ (default: the package's assets)"
        )
    records = commands.add_parser("records", help="train a model on the true facts of a CounterFact-style file")
    records.set_defaults(run=_records)
    records.add_argument("file", type=Path, help="JSON: CounterFact's full schema, or the flat one of counterfact-edit")
    records.add_argument("--limit", type=int, help="use the first N records only")
    records.add_argument("--vocab", type=int, default=4096, help="size of the vocabulary (default 4096)")
    records.add_argument(
        "--batch-rows", type=int, default=16, help="rows of 64 tokens a step; more are faster (default 16)"
    )
    world.add_argument(
        "--out", type=Path, default=ASSETS, help="folder for tiny-FAMILY/ and world/ (default: the package's assets)"
    )
    world.add_argument(
        "--size", type=int, help=f"how many times as many subjects as the shipped world, up to {LARGEST} (default 1)"
    )
    world.add_argument("--family", choices=("llama",), help="another family with the same words (default: GPT-2)")
    records.add_argument(
        "--out", type=Path, required=True, help="folder for the model; a non-empty one must hold an earlier model"
    )
    shapes = [(world, (52, 6)), (records, (70, 6)), *zip(encoders, ENCODERS.values(), strict=True)]
    for command, (epochs, layers, *decoder) in shapes:
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--epochs", type=int, default=epochs, help=f"(default {epochs})")
        command.add_argument("--width", type=int, default=128, help="of the residual stream (default 128)")
        blocks = f"number of blocks, of the encoder where there is one (default {layers})"
        command.add_argument("--layers", type=int, default=layers, help=blocks)
        for number in decoder:
            command.add_argument(
                "--decoder-layers", type=int, default=number, help=f"number of blocks of the decoder (default {number})"
            )
        command.add_argument("--threads", type=int, default=1, help="CPU threads; the result depends on it (default 1)")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    for name in SHOWN:
        value = getattr(arguments, name, None)
        if name not in ("seed", "family") and value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    if (getattr(arguments, "size", None) or 1) > LARGEST:
        raise UsageError(f"--size must be at most {LARGEST}, not {arguments.size}: there are no more names")
    if arguments.width % 4:
        raise UsageError(f"--width must be a multiple of 4 (there are 4 heads), not {arguments.width}")
    if arguments.layers < 2 and "decoder_layers" not in arguments:
        raise UsageError(f"--layers must be at least 2 (facts below, reading above), not {arguments.layers}")


def _options(arguments: argparse.Namespace) -> TrainOptions:
    import torch

    from tools.tiny_world.train import TrainOptions

    torch.set_num_threads(arguments.threads)
    given = {
        field.name: value
        for field in fields(TrainOptions)
        if (value := getattr(arguments, field.name, None)) is not None
    }
    return TrainOptions(bottleneck=max(1, arguments.layers * 2 // 3), **given)


def _command(arguments: argparse.Namespace) -> str:
    """The command that makes the same result again, with every default spelled out and no path of this machine."""
    shown = ["python", "-m", "tools.tiny_world", getattr(arguments, "kind", arguments.run.__name__.lstrip("_"))]
    if "file" in arguments:
        shown.append(arguments.file.name)
    for name in SHOWN:
        if getattr(arguments, name, None) is not None:
            shown += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    return " ".join(shown)


def _world(arguments: argparse.Namespace) -> None:
    from tools.tiny_world.assets import make_assets

    with _progress("training") as report:
        manifest = make_assets(arguments.out, _options(arguments), _command(arguments), report, arguments.size or 1)
    _summary(arguments.out, manifest)


def _encoder(arguments: argparse.Namespace) -> None:
    import torch

    from tools.tiny_world.encoder_assets import make_encoder
    from tools.tiny_world.encoders import RECIPES, EncoderOptions

    torch.set_num_threads(arguments.threads)
    given = {
        field.name: getattr(arguments, field.name) for field in fields(EncoderOptions) if hasattr(arguments, field.name)
    }
    with _progress("training") as report:
        manifest = make_encoder(
            arguments.kind,
            arguments.out,
            EncoderOptions(**RECIPES[arguments.kind], **given),
            _command(arguments),
            report,
        )
    _summary(arguments.out, manifest)


def _records(arguments: argparse.Namespace) -> None:
    from tools.tiny_world.from_records import make_fact_model

    with _progress("training") as report:
        manifest = make_fact_model(
            arguments.file,
            arguments.out,
            arguments.limit,
            arguments.vocab,
            _options(arguments),
            _command(arguments),
            report,
        )
    _summary(arguments.out, manifest)


def _summary(out: Path, manifest: dict[str, Any]) -> None:
    recall = ", ".join(
        f"{name.replace('_', '-')} wordings {value} %" for name, value in manifest["recall_percent"].items()
    )
    print(f"{manifest['parameters']:,} parameters, {manifest['facts']:,} facts; recall: {recall}")
    print(f"written to {out}")


@contextmanager
def _progress(label: str) -> Iterator[Callable[[int, int, float], None]]:
    """A bar with the time left on a terminal; elsewhere a plain line now and then."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _plain_lines(label)
        return
    columns = (
        TextColumn(label),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.2f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(label, total=None, loss=float("nan"))
        yield lambda step, steps, loss: progress.update(task, completed=step, total=steps, loss=loss)


def _plain_lines(label: str) -> Callable[[int, int, float], None]:
    started = shown = time.monotonic()  # the first line comes late: the first step is slow, and no guide to the rest

    def report(step: int, steps: int, loss: float) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown >= LINE_EVERY_S or step == steps:
            left = (now - started) / step * (steps - step)
            print(f"{label}: step {step}/{steps}, loss {loss:.2f}, {left:.0f} s left", file=sys.stderr, flush=True)
            shown = now

    return report


if __name__ == "__main__":
    sys.exit(main())
