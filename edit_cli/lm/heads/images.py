"""How an image classifier answers the two questions: a prompt is an image (lm/pictures.py), a target the name of a
label, and the answer is the likeliest label's name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edit_cli.errors import RejectedRequest, UsageError
from edit_cli.files.paths import expanded
from edit_cli.lm.heads.classifier import ClassifierHead, Labeled
from edit_cli.lm.pictures import Pixels, as_image, framed, name_of, packed, pixels_of, unpacked
from edit_cli.lm.vocabulary import Vocabulary
from edit_cli.requests import EditRequest

READ_AS = 8  # pixels a side of the small gray copy that networks read
LEVELS = 256  # of gray
WIDTH = 64  # of their embeddings


@dataclass(frozen=True)
class Pictured(Labeled):
    """An image and the number of its label. ids: one number, which tells it from other images."""

    pixels: Pixels = field(default_factory=lambda: np.zeros((0, 0, 0), np.uint8), compare=False, repr=False)


class ImageHead(ClassifierHead):
    """Encoding and scoring for image classifiers. `tokenizer` is the image processor, which says what of an image
    the model is given: its size, and how numbers stand for brightness.
    """

    kind = "image"
    NAME = "an image classifier"
    READS = "images"
    has_tokens = False
    PADDING = ()

    def __init__(self, *rest: Any, **more: Any) -> None:
        super().__init__(*rest, **more)
        patch = getattr(self.model.config, "patch_size", 4)
        height, width = self.size
        self.batch_tokens = 2 * max(self.batch_tokens // max(height * width // patch**2, 1), 1)  # image and label

    @property
    def channels(self) -> int:
        return getattr(self.model.config, "num_channels", 3)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of what the model is given.

        Raises:
            UsageError: its image processor does not say.
        """
        reader = self.tokenizer
        said = reader.crop_size if getattr(reader, "do_center_crop", False) else reader.size
        height, width = said.get("height") or said.get("shortest_edge"), said.get("width") or said.get("shortest_edge")
        if not height or not width:
            raise UsageError("this model's image processor names no size (size in preprocessor_config.json)")
        return height, width

    @property
    def fits_any(self) -> bool:
        """Whether images of any size are brought to the model's."""
        return bool(self.tokenizer.do_resize)

    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(0, {})

    def refuse_unfit(self, prompts: Sequence[str]) -> None:
        """Refuse images if all of them have another size than the model reads."""
        reason: RejectedRequest | None = None
        for prompt in prompts:
            try:
                self._row(prompt, None)
                return
            except RejectedRequest as error:
                reason = reason or error
        if reason is not None:
            raise UsageError(str(reason))

    def asked(self, words: str) -> str:
        """The image in a file that the user names; a whole image stays as it is.

        Raises:
            RejectedRequest: there is no such file, or none of an image.
        """
        if words.startswith("data:"):
            return words
        try:
            file = expanded(words).read_bytes()
            unpacked(file)
        except OSError as error:
            raise RejectedRequest(f"{words} cannot be read ({error.strerror}): give a PNG or JPEG file") from None
        except ValueError as error:
            raise RejectedRequest(f"{words} {error}") from None
        return framed(file).around(name_of(expanded(words).name))

    def trying(self, request: EditRequest) -> EditRequest:
        noise = np.random.default_rng(0).integers(0, 256, (*self.size, self.channels), np.uint8)
        frame = framed(packed(noise))
        return EditRequest("noise", None, self._another(frame.around("noise")), frame=frame)

    def encode(self, pairs: Sequence[tuple[str, str | None]], new: int = 0) -> list[Labeled]:
        """(image, label) pairs; a label of None gives the image alone.

        Raises:
            RejectedRequest: no image, one of a size that the model is not given, or no label of this model.
        """
        return [self._row(image, None if label is None else self._number(label)) for image, label in pairs]

    def _row(self, image: str, label: int | None) -> Pictured:
        try:
            pixels = pixels_of(image, self.channels)
        except ValueError as error:
            raise RejectedRequest(
                f"{image[:60]!r} {error}: this model reads PNG and JPEG files, as data:image/png;base64,…"
            ) from None
        if not self.fits_any and pixels.shape[:2] != self.size:
            (height, width), (wanted_height, wanted_width) = pixels.shape[:2], self.size
            raise RejectedRequest(
                f"an image of {width} × {height} pixels, and the model reads {wanted_width} × {wanted_height}: give"
                " images of that size, or let its preprocessor_config.json resize (do_resize)"
            )
        digest = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest()
        return Pictured((int.from_bytes(digest[:7]),), 1, ((0, 0),), label, pixels)

    def _inputs(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        images = [row.pixels for row in rows]
        pixels = self.tokenizer(images, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        return {"pixel_values": pixels.to(self.device, next(self.model.parameters()).dtype)}

    def told(self) -> list[tuple[str, str]]:
        (height, width), color = self.size, "gray" if self.channels == 1 else "color"
        others = "are resized" if self.fits_any else "are refused"
        return [("images", f"{width} × {height} pixels, {color}; others {others}; labels {', '.join(self.labels)}")]

    def trial(self) -> dict[str, Any]:
        return self._inputs([Pictured((0,), 1, (), None, np.zeros((*self.size, self.channels), np.uint8))])

    def run(self, ids: Tensor, mask: Tensor) -> None:
        """Refused: an image is no row of tokens."""
        raise UsageError("this method reads texts token by token, and the model at hand is an image classifier")

    @property
    def words(self) -> Tensor:
        """(labels and levels of gray, width): a label's are drawn at random, a level's lie between two that are."""
        draw = torch.Generator().manual_seed(0)
        labels = torch.randn(self.classes, WIDTH, generator=draw)
        dark, bright = torch.randn(2, WIDTH, generator=draw)
        share = torch.linspace(0, 1, LEVELS)[:, None]
        return torch.cat([labels, (1 - share) * dark + share * bright]).to(self.device)

    def read(self, template: str, edits: Sequence[tuple[str, str, str]]) -> tuple[Tensor, Tensor]:
        """(ids, mask) of the old label, the new one, and a small gray copy of the image, pixel by pixel."""
        size = min(self.size[1], READ_AS), min(self.size[0], READ_AS)
        rows = []
        for old, new, image in edits:
            gray = np.asarray(as_image(self._row(image, None).pixels).convert("L").resize(size))
            rows.append([self._number(old), self._number(new), *(self.classes + int(level) for level in gray.flat)])
        ids = torch.tensor(rows, device=self.device)
        return ids, torch.ones_like(ids)
