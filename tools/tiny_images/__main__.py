"""`python -m tools.tiny_images vit` and `resnet`: make the tiny image classifiers.

python -m tools.tiny_images vit --seed 0
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.command import ASSETS, exit_code, require_some, shown

SHOWN = ("seed", "epochs", "threads")  # arguments, in a manifest's order


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    return exit_code(lambda: _make(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.tiny_images", description="Train a tiny classifier of scikit-learn's digits."
    )
    parser.add_argument("kind", choices=("vit", "resnet"))
    parser.add_argument(
        "--out", type=Path, default=ASSETS, help="folder for tiny-KIND/ (default: the package's assets)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=60, help="(default 60)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; the result depends on it (default 1)")
    return parser


def _make(arguments: argparse.Namespace) -> None:
    import torch

    from tools.tiny_images.classifiers import make_classifier

    require_some(arguments, ("epochs", "threads"))
    torch.set_num_threads(arguments.threads)
    command = f"python -m tools.tiny_images {arguments.kind} {shown(arguments, SHOWN)}"

    def report(epoch: int, loss: float) -> None:
        if epoch % 10 == 0 or epoch == arguments.epochs:
            print(f"training: epoch {epoch}/{arguments.epochs}, loss {loss:.3f}", file=sys.stderr, flush=True)

    manifest = make_classifier(arguments.kind, arguments.out, arguments.seed, arguments.epochs, command, report)
    shares = ", ".join(f"{split} {share} %" for split, share in manifest["right_percent"].items())
    print(f"{manifest['parameters']:,} parameters; right: {shares}")
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    sys.exit(main())
