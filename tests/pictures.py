"""Tiny random image classifiers and images, shared by the tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from edit_cli.lm.model import LM
from edit_cli.lm.pictures import Pixels, framed, packed
from edit_cli.requests import Case, EditRequest, Probe

LABELS = ["cat", "dog", "frog", "ship"]
CLASSIFIERS = ("vit", "resnet")
SIDE = {"vit": 8, "resnet": 32}  # pixels; a ResNet's stem makes an eighth of a side
NAMES: dict[str, Any] = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}


def classifier(family: str, channels: int = 3) -> Any:
    """One of random weights, large enough to matter; norms have statistics of their own."""
    torch.manual_seed(0)
    if family == "vit":
        shape: dict[str, Any] = {
            "image_size": 8,
            "patch_size": 4,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        }
        model: Any = ViTForImageClassification(
            ViTConfig(num_channels=channels, intermediate_size=24, initializer_range=0.3, **shape, **NAMES)
        )
    else:
        shape = {"embedding_size": 6, "hidden_sizes": [6, 8], "depths": [2, 1], "layer_type": "basic"}
        model = ResNetForImageClassification(ResNetConfig(num_channels=channels, **shape, **NAMES))
        for name, value in model.named_buffers():
            if value.is_floating_point():
                value.uniform_(0.5, 1.5) if name.endswith("var") else value.normal_(std=0.2)
    side = SIDE[family]
    reader = ViTImageProcessorPil(
        size={"height": side, "width": side}, do_resize=False, image_mean=[0.4] * channels, image_std=[0.3] * channels
    )
    return LM(model, reader, f"tiny-{family}")


def noise(count: int, side: int, channels: int = 3) -> list[Pixels]:
    drawn = np.random.default_rng(7)
    return [drawn.integers(0, 256, (side, side, channels), np.uint8) for _ in range(count)]


def prompt(pixels: Pixels, name: str = "noise") -> str:
    return framed(packed(pixels)).around(name)


def cases(lm: Any, count: int = 4) -> list[Case]:
    """Edits of noise into other labels than the model gives, each beside the others, which must stay."""
    frames = [framed(packed(pixels)) for pixels in noise(count, SIDE[lm.name.removeprefix("tiny-")])]
    says = lm.generate([frame.around(f"n{i}") for i, frame in enumerate(frames)], 1)
    found = []
    for i, frame in enumerate(frames):
        new = next(label for label in LABELS if label != says[i])
        kept = [Probe("locality", f"n{j}", says[j], group="random", frame=frames[j]) for j in range(count) if j != i]
        request = EditRequest(f"n{i}", None, new, says[i], frame=frame)
        found.append(Case(f"n{i}", (request,), (Probe("rewrite", f"n{i}", new, says[i], frame=frame), *kept)))
    return found
