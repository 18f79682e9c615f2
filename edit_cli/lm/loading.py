"""From the keys of conf/model/*.yaml to an `LM`: the embedded model, a local folder, or a hub id."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edit_cli.errors import MissingError, UsageError
from edit_cli.lm.layout import LayoutOptions
from edit_cli.monitor import Monitor

EMBEDDED = "embedded:"


@dataclass
class ModelOptions:
    """Keys of the `model` group. `records`, `corpus`, `perplexity_text` and `default_limit` say what goes with the model."""

    name: str
    id: str
    revision: str | None = None
    dtype: str = "float32"
    device: str = "auto"
    device_map: str | None = None
    trust_remote_code: bool = False
    batch_tokens: int = 8192
    records: str | None = None
    corpus: str = "wikipedia"
    perplexity_text: str | None = None
    default_limit: int | None = None
    layout: LayoutOptions = field(default_factory=LayoutOptions)

    def load(self, monitor: Monitor | None = None) -> Any:
        """Load model and tokenizer.

        Raises:
            MissingError: no such folder or hub id, or no network to fetch it; says what was looked for and the remedy.
            UsageError: an unknown dtype or device, or a model that no editor can be right on.
        """
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from edit_cli.lm.model import LM

        dtype = getattr(torch, self.dtype, None)
        if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise UsageError(f"model.dtype={self.dtype}: choose float32, bfloat16, float16 or float64")
        source = _resolve(self.id, self.revision)
        common = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        if Path(source).is_dir():
            common["local_files_only"] = True
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, **common)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, device_map=self.device_map, **common)
        except (OSError, ValueError, KeyError) as error:
            raise MissingError(f"model.id={self.id} cannot be loaded: {_first_line(error)}") from error
        if self.device_map is None:
            model.to(_device(self.device))
        revision = self.revision or getattr(model.config, "_commit_hash", None)
        return LM(model, tokenizer, self.name, revision, self.layout, monitor, self.batch_tokens)


def _resolve(model_id: str, revision: str | None) -> str:
    """A folder to load from, or a hub id that was looked up once, without retries."""
    if model_id.startswith(EMBEDDED):
        return str(Path(__file__).parent.parent / "assets" / model_id.removeprefix(EMBEDDED))
    folder = Path(model_id).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise MissingError(f"model.id={model_id} is a folder without config.json; give a folder that save_pretrained wrote")
        return str(folder)
    if folder.is_absolute() or model_id.startswith((".", "~")) or model_id.count("/") > 1:
        raise MissingError(f"model.id={model_id}: no such folder")
    return _from_hub(model_id, revision)


def _from_hub(model_id: str, revision: str | None) -> str:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    remedy = "give a local folder instead: model.id=/path/to/folder (written by save_pretrained)"
    try:
        hf_hub_download(model_id, "config.json", revision=revision, etag_timeout=5)
    except HFValidationError:
        raise MissingError(f"model.id={model_id} is neither a folder here nor a valid hub id; {remedy}") from None
    except LocalEntryNotFoundError:
        raise MissingError(f"model.id={model_id} is neither a folder here nor in the hub cache, and the hub cannot be reached; {remedy}") from None
    except (EntryNotFoundError, HfHubHTTPError) as error:
        raise MissingError(f"model.id={model_id} was looked for on the hub: {_first_line(error)}; {remedy}") from None
    except Exception as error:  # whatever the transport raises without a network
        raise MissingError(f"model.id={model_id} is no folder here and the hub cannot be reached ({type(error).__name__}); {remedy}") from None
    return model_id


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        raise UsageError(f"model.device={name} is not available here; choose auto or cpu") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
