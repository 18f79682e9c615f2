"""What kind of model this is: a causal language model, an encoder-decoder, a sequence or an image classifier.

Its configuration says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from edit_cli.errors import UsageError
from edit_cli.lm.heads.answers import NEEDS_CAUSAL
from edit_cli.lm.heads.base import Head
from edit_cli.lm.heads.causal import CausalHead
from edit_cli.lm.heads.classifier import ClassifierHead
from edit_cli.lm.heads.images import ImageHead
from edit_cli.lm.heads.seq2seq import Seq2SeqHead

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAMES = {
    "causal": "a causal language model",
    "seq2seq": "an encoder-decoder model",
    "classifier": "a sequence classifier",
    "image": "an image classifier",
}
KINDS = tuple(NAMES)
SAVED_FROM = {"ForSequenceClassification": "classifier", "ForImageClassification": "image"}  # ends of classes' names


def kind_of(config: Any, wanted: str = "auto") -> str:
    """`wanted`, or what the files were saved from: encoder-decoder models are known by their structure, classifiers by
    the class they
    were saved from; all else is causal.
    """
    if wanted != "auto":
        return wanted
    saved_from = getattr(config, "architectures", None) or [""]
    for ending, kind in SAVED_FROM.items():
        if saved_from[0].endswith(ending):
            return kind
    return "seq2seq" if getattr(config, "is_encoder_decoder", False) else "causal"


def auto_class(kind: str, config: Any, model_id: str) -> Any:
    """The transformers class that loads a model of that kind.

    Raises:
        UsageError: the family has none.
    """
    import transformers

    name, mapping, what = {
        "causal": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING", "causal language model"),
        "seq2seq": (
            "AutoModelForSeq2SeqLM",
            "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
            "encoder-decoder language model",
        ),
        "classifier": (
            "AutoModelForSequenceClassification",
            "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
            "sequence classifier",
        ),
        "image": (
            "AutoModelForImageClassification",
            "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
            "image classifier",
        ),
    }[kind]
    if type(config) not in getattr(transformers, mapping) and name not in getattr(config, "auto_map", {}):
        raise UsageError(f"model.id={model_id} is of the family {config.model_type}, which has no {what}")
    return getattr(transformers, name)


def reader_class(kind: str) -> Any:
    """The transformers class that loads what reads a model's prompts: its tokenizer, or its image processor."""
    from transformers import AutoImageProcessor, AutoTokenizer

    return AutoImageProcessor if kind == "image" else AutoTokenizer


def head_of(
    model: PreTrainedModel,
    tokenizer: Any,
    device: torch.device,
    batch_tokens: int,
    labels: Sequence[str] | None = None,
    replies: bool = False,
) -> Head[Any]:
    """How this model answers: an encoder-decoder, a model without a language-modeling head, which reads texts or
    images, or a causal one. tokenizer: of an image classifier, its image processor.

    labels: names of a classifier's labels, see there. replies: whether a causal one ends after an answer; the other
    kinds always do.

    Raises:
        UsageError: such names for a model that writes, or that do not fit.
    """
    writes = getattr(model.config, "is_encoder_decoder", False) or model.get_output_embeddings() is not None
    if not writes:
        return (ImageHead if getattr(model, "main_input_name", None) == "pixel_values" else ClassifierHead)(
            model, tokenizer, device, batch_tokens, labels
        )
    if labels:
        raise UsageError(f"model.labels={list(labels)} names a classifier's labels, and this model writes text")
    if getattr(model.config, "is_encoder_decoder", False):
        return Seq2SeqHead(model, tokenizer, device, batch_tokens)
    return CausalHead(model, tokenizer, device, batch_tokens, replies)


def require_causal(lm: Any, what: str) -> None:
    """Refuse an `LM` of another kind (UsageError); `what` is what cannot be done with it."""
    if lm.head.kind != "causal":
        raise UsageError(f"{what} {NEEDS_CAUSAL}, and {lm.name} is {NAMES[lm.head.kind]}")
