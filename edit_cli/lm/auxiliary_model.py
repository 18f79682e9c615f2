"""Small models that stand beside the edited one: read from a checkpoint, or begun from a family's configuration
class.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edit_cli.config.schema import Config
from edit_cli.errors import MissingError, UsageError
from edit_cli.lm.heads.kinds import auto_class
from edit_cli.lm.loading import silent
from edit_cli.lm.model_files import resolve

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class AuxiliaryModelConfig(Config):
    """Where a small model beside the edited one comes from."""

    checkpoint: str | None = None
    """Hub id, folder or embedded:NAME; null: the model begins at random, from family and sizes."""
    family: str | None = None
    """Model type of transformers, such as bert, gpt2 or t5."""
    sizes: dict[str, Any] = field(default_factory=dict)
    """Keys of its configuration class; beside a checkpoint they overrule what it says (fewer layers, say)."""
    tokenizer: str | None = None
    """Hub id, folder or embedded:NAME; null: the checkpoint's, else the edited model's."""

    def require(self, key: str) -> None:
        """Refuse a checkpoint that is not there, before anything is loaded. Raises MissingError, which names `key`."""
        if self.checkpoint:
            resolve(self.checkpoint, None, f"{key}.checkpoint")

    def build(self, kind: str, own_tokenizer: Any, key: str) -> tuple[PreTrainedModel, Any]:
        """(model, tokenizer); trainable, dropout 0. kind: encoder, or one of lm.kinds.

        key: name of this group, for messages.

        Raises:
            UsageError: neither checkpoint nor family, or settings that the family does not have or the checkpoint's
                weights do not fit. MissingError: a checkpoint that is not there.
        """
        import torch
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        if not self.checkpoint and not self.family:
            raise UsageError(
                f"{key} has neither checkpoint nor family: give {key}.checkpoint=FOLDER, or {key}.family=bert and"
                f" {key}.sizes"
            )
        source = resolve(self.checkpoint, None, f"{key}.checkpoint") if self.checkpoint else None
        words = resolve_words(self.tokenizer, f"{key}.tokenizer") if self.tokenizer else source and source.path
        with silent():
            try:
                tokenizer = AutoTokenizer.from_pretrained(words, trust_remote_code=False) if words else own_tokenizer
                if source:
                    config = AutoConfig.from_pretrained(source.path, **self.sizes, trust_remote_code=False)
                else:
                    assert self.family  # one of the two is given
                    config = AutoConfig.for_model(
                        self.family, **{"vocab_size": len(tokenizer), **special(tokenizer), **self.sizes}
                    )
            except (OSError, ValueError, TypeError, KeyError) as error:
                raise UsageError(f"{key}: {str(error).strip().splitlines()[0]}") from None
            still(config)
            auto = AutoModel if kind == "encoder" else auto_class(kind, config, str(self.checkpoint or self.family))
            try:
                model = (
                    auto.from_pretrained(source.path, config=config, dtype=torch.float32, trust_remote_code=False)
                    if source
                    else auto.from_config(config)
                )
            except RuntimeError:  # transformers lists the matrices of another shape
                raise UsageError(
                    f"{key}.sizes={self.sizes} do not fit the weights of {key}.checkpoint={self.checkpoint}: beside a"
                    " checkpoint there may be fewer blocks, not other widths"
                ) from None
            except (OSError, ValueError, TypeError, AttributeError) as error:
                raise MissingError(f"{key} cannot be made: {str(error).strip().splitlines()[0]}") from None
        if kind == "encoder" and config.is_encoder_decoder:
            model = model.get_encoder()
        return model.float(), tokenizer


def resolve_words(tokenizer: str, key: str) -> str:
    return resolve(tokenizer, None, key).path


def special(tokenizer: Any) -> dict[str, int]:
    """Ids of the special tokens that configurations name."""
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {name: value for name, value in ids.items() if value is not None}


def still(config: Any) -> None:
    """No dropout: editors are trained without (publication, appendix)."""
    for name, value in config.to_dict().items():
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)


def same_vocabulary(first: Any, second: Any) -> bool:
    """Whether two tokenizers give the same tokens the same numbers."""
    return first is second or first.get_vocab() == second.get_vocab()
