"""`python -m tools.tiny_translation`: make two invented languages and the tiny translator.

python -m tools.tiny_translation --seed 0
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.command import ASSETS, exit_code, require_some, shown

SHOWN = ("seed", "steps", "threads")  # arguments, in a manifest's order


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    return exit_code(lambda: _make(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.tiny_translation", description="Train a tiny translator between two invented languages."
    )
    where = "folder for tiny-translator/ and translation/ (default: the package's assets)"
    parser.add_argument("--out", type=Path, default=ASSETS, help=where)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1500, help="of 64 sentences (default 1500)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; the result depends on it (default 1)")
    return parser


def _make(arguments: argparse.Namespace) -> None:
    import torch

    from tools.tiny_translation.translator import make_translator

    require_some(arguments, ("steps", "threads"))
    torch.set_num_threads(arguments.threads)
    command = f"python -m tools.tiny_translation {shown(arguments, SHOWN)}"

    def report(step: int, loss: float) -> None:
        if step % 100 == 0 or step == arguments.steps:
            print(f"training: step {step}/{arguments.steps}, loss {loss:.3f}", file=sys.stderr, flush=True)

    manifest = make_translator(arguments.out, arguments.seed, arguments.steps, command, report)
    shares = ", ".join(f"{split} {share} %" for split, share in manifest["right_percent"].items())
    print(f"{manifest['parameters']:,} parameters; translated as the references: {shares}")
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    sys.exit(main())
