"""From the keys of conf/model/*.yaml to an `LM`: the embedded model, a local folder, or a hub id."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from edit_cli.errors import MissingError, OutOfMemory, UsageError
from edit_cli.lm.layout import LayoutOptions
from edit_cli.monitor import Monitor

if TYPE_CHECKING:
    import torch

    from edit_cli.lm.model import LM

EMBEDDED = "embedded:"
DTYPES = ("float32", "bfloat16", "float16", "float64")
ASSETS = Path(__file__).parent.parent / "assets"
TIMEOUT = 5  # seconds that the hub may take to answer
REMEDY = "give a local folder instead: model.id=/path/to/folder (written by save_pretrained)"


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

    def load(self, monitor: Monitor | None = None) -> LM:
        """Load model and tokenizer.

        Raises:
            MissingError: no such folder or hub id, no network to fetch it, or damaged files; says what was looked for and the remedy.
            UsageError: an unknown dtype or device, or a model that no editor can be right on. OutOfMemory: it does not fit the device.
        """
        from edit_cli.lm.model import LM

        if self.dtype not in DTYPES:
            raise UsageError(f"model.dtype={self.dtype}: choose {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
        place = self._place()
        source = _resolve(self.id, self.revision)
        model, tokenizer = self._read(source, place)
        if any(parameter.is_meta for parameter in model.parameters()):
            raise UsageError(
                f"model.id={self.id} does not fit the devices in {self.dtype}, and weights that are kept elsewhere cannot be edited: "
                "use a smaller model.dtype (bfloat16) or model.device=cpu"
            )
        return LM(model, tokenizer, self.name, source.revision, self.layout, monitor, self.batch_tokens, self.id)

    def _place(self) -> str | torch.device:
        """Where the weights go: a device, or the name of a way to spread them over all devices."""
        if self.device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
            return self.device_map
        return _device("model.device", self.device) if self.device_map is None else _device("model.device_map", self.device_map)

    def _read(self, source: Source, place: str | torch.device) -> tuple[Any, Any]:
        import torch
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer

        common = {"revision": source.revision, "trust_remote_code": self.trust_remote_code, "local_files_only": source.local}
        with _silent():
            with self._reading("config.json"):
                config = AutoConfig.from_pretrained(source.path, **common)
            own_code = getattr(config, "auto_map", {})
            if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and "AutoModelForCausalLM" not in own_code:
                raise UsageError(f"model.id={self.id} is of the family {config.model_type}, which has no causal language model")
            with self._reading("tokenizer"):
                tokenizer = AutoTokenizer.from_pretrained(source.path, **common)
            with self._reading("weights"):
                # straight to where they are to be: a model larger than the host's memory need not pass through it whole
                how = {"dtype": getattr(torch, self.dtype), "device_map": place, "output_loading_info": True, "ignore_mismatched_sizes": True}
                model, found = AutoModelForCausalLM.from_pretrained(source.path, config=config, **how, **common)
        for problem, names in (("missing", found["missing_keys"]), ("of another shape", [name for name, *_ in found["mismatched_keys"]])):
            if names:
                raise MissingError(f"model.id={self.id}: {len(names)} weights are {problem} in its files, such as {min(names)}")
        return model, tokenizer

    @contextmanager
    def _reading(self, part: str) -> Iterator[None]:
        """Name the part that cannot be read: the libraries raise anything from OSError to a bare Exception on damaged files."""
        import torch

        try:
            yield
        except torch.OutOfMemoryError:
            smaller = "a smaller model.dtype (bfloat16), model.device_map=auto for several devices, or model.device=cpu"
            raise OutOfMemory(f"model.id={self.id} does not fit the device's memory in {self.dtype}: use {smaller}") from None
        except Exception as error:
            raise MissingError(f"model.id={self.id}: its {part} cannot be read: {_first_line(error)}") from error


def packaged(path: str) -> Path:
    """The file or folder that `embedded:<path>` names, inside the package's assets.

    Raises:
        MissingError: there is no such asset, or the path leaves the assets.
    """
    name = PurePosixPath(path.removeprefix(EMBEDDED))
    if name.is_absolute() or ".." in name.parts or not name.parts or not (ASSETS / name).exists():
        raise MissingError(f"{EMBEDDED}{name} names nothing that comes with edit-cli")
    return ASSETS / name


@dataclass(frozen=True)
class Source:
    """A folder to load from, or a hub id with its commit. local: only files that are here already are used."""

    path: str
    revision: str | None
    local: bool


def _resolve(model_id: str, revision: str | None) -> Source:
    if model_id.startswith(EMBEDDED):
        return Source(str(packaged(model_id)), None, True)
    folder = Path(model_id).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise MissingError(f"model.id={model_id} is a folder without config.json; give a folder that save_pretrained wrote")
        return Source(str(folder), revision, True)
    if folder.is_absolute() or model_id.startswith((".", "~")) or model_id.count("/") > 1:
        raise MissingError(f"model.id={model_id}: no such folder")
    return _on_hub(model_id, revision)


def _on_hub(model_id: str, revision: str | None) -> Source:
    """The commit that the hub has, asked once and without retries, or the one in the hub's cache here.

    Raises:
        MissingError: neither.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError

    where = f"model.id={model_id} is no folder here"
    try:
        found = get_hf_file_metadata(hf_hub_url(model_id, "config.json", revision=revision), timeout=TIMEOUT)
        return Source(model_id, found.commit_hash or revision, False)
    except HFValidationError:
        raise MissingError(f"{where} and no valid hub id; {REMEDY}") from None
    except Exception as error:  # whatever the transport raises without a network
        reason = error
    cached = try_to_load_from_cache(model_id, "config.json", revision=revision)
    if isinstance(cached, str):
        return Source(model_id, Path(cached).parent.name, True)  # …/snapshots/COMMIT/config.json
    if isinstance(reason, GatedRepoError):
        raise MissingError(f"model.id={model_id} is gated: accept its licence on the hub and log in with `hf auth login`, or {REMEDY}")
    if isinstance(reason, HfHubHTTPError):
        raise MissingError(f"{where}, and the hub answers: {_first_line(reason)}; {REMEDY}")
    raise MissingError(f"{where} and not in the hub's cache, and the hub cannot be reached ({type(reason).__name__}); {REMEDY}")


def _device(key: str, name: str) -> torch.device:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        raise UsageError(f"{key}={name} is not available here; choose auto or cpu") from None


@contextmanager
def _silent() -> Iterator[None]:
    """Without the progress bars and reports of transformers: errors say what is wrong, and the console draws progress."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
