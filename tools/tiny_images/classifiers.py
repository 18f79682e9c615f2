"""A ViT and a ResNet of transformers that tell digits apart.

They are trained as image classifiers are: AdamW, images moved by up to a pixel, cross-entropy.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from edit_cli.datasets.digits import LABELS, digits
from tools.tiny_world.assets import replace_folder, save_model, write_json

SIDE = 8  # pixels of the images
ENLARGED = 32  # of what the ResNet is given: its stem makes an eighth of a side
ROWS = 64
LR, WEIGHT_DECAY = {"vit": 2e-3, "resnet": 3e-3}, 0.05
WARM_UP = 60  # steps

Report = Callable[[int, float], None]


def make_classifier(kind: str, out: Path, seed: int, epochs: int, command: str, report: Report) -> dict[str, Any]:
    """Write `out`/tiny-<kind>, replacing what is there only when all is done. Returns the manifest."""
    from edit_cli.lm.loading import ModelOptions

    torch.manual_seed(seed)
    model, reader = new_classifier(kind)
    train(model, reader, LR[kind], epochs, seed, report)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".making-") as folder:
        staged = Path(folder) / f"tiny-{kind}"
        save_model(model, reader, staged)
        manifest: dict[str, Any] = {"command": command, "seed": seed}
        manifest["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        lm = ModelOptions(name=staged.name, id=str(staged), device="cpu").load()
        manifest["right_percent"] = {
            split: round(100 * _right(lm.model, reader, split), 2) for split in ("train", "validation", "test")
        }
        write_json(staged / "manifest.json", manifest, indent=2)
        replace_folder(staged, out / staged.name)
    return manifest


def new_classifier(kind: str) -> tuple[Any, Any]:
    """(an untrained model, its image processor)."""
    from transformers import (
        ResNetConfig,
        ResNetForImageClassification,
        ViTConfig,
        ViTForImageClassification,
        ViTImageProcessorPil,
    )

    names: dict[str, Any] = {
        "id2label": dict(enumerate(LABELS)),
        "label2id": {label: i for i, label in enumerate(LABELS)},
    }
    size = SIDE if kind == "vit" else ENLARGED
    reader = ViTImageProcessorPil(
        size={"height": size, "width": size}, do_resize=size != SIDE, image_mean=[0.5], image_std=[0.5]
    )
    if kind == "vit":
        config = ViTConfig(
            image_size=SIDE, patch_size=2, num_channels=1, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
            intermediate_size=128, initializer_range=0.1, **names,
        )  # fmt: skip
        return ViTForImageClassification(config), reader
    shape: dict[str, Any] = {
        "embedding_size": 16,
        "hidden_sizes": [16, 32, 64],
        "depths": [1, 1, 1],
        "layer_type": "basic",
    }
    return ResNetForImageClassification(ResNetConfig(num_channels=1, **shape, **names)), reader


def train(model: Any, reader: Any, lr: float, epochs: int, seed: int, report: Report) -> None:
    """Minimize the cross-entropy of the training split; the learning rate rises for a while, and then falls to 0."""
    images, labels = _read(reader, "train")
    steps = epochs * (len(images) // ROWS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / WARM_UP, 1 - step / steps))
    draw = torch.Generator().manual_seed(seed)
    pixel = images.shape[-1] // SIDE
    model.train()
    for epoch in range(1, epochs + 1):
        total = 0.0
        for rows in torch.randperm(len(images), generator=draw)[: len(images) // ROWS * ROWS].split(ROWS):
            down, right = (pixel * (torch.randint(3, (2,), generator=draw) - 1)).tolist()
            loss = F.cross_entropy(model(_moved(images[rows], down, right)).logits, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        report(epoch, total / (len(images) // ROWS))
    model.eval()


def _moved(images: Tensor, down: int, right: int) -> Tensor:
    """The images (rows, channels, height, width), moved by so many pixels; what comes in is black."""
    room = max(abs(down), abs(right))
    wide = F.pad(images, (room,) * 4, value=-1.0)
    top, left, side = room - down, room - right, images.shape[-1]
    return wide[..., top : top + side, left : left + side]


def _read(reader: Any, split: str) -> tuple[Tensor, Tensor]:
    """(pixels as the model is given them, numbers of labels) of a split."""
    chosen = [(pixels, LABELS.index(label)) for pixels, label, own in digits() if own == split]
    read = reader([pixels for pixels, _ in chosen], return_tensors="pt", input_data_format="channels_last")
    return read["pixel_values"], torch.tensor([number for _, number in chosen])


@torch.no_grad()
def _right(model: Any, reader: Any, split: str) -> float:
    """The share of a split that the model gives its label."""
    images, labels = _read(reader, split)
    return float((model(images).logits.argmax(-1) == labels).float().mean())
