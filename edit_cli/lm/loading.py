"""From the settings of a model to an `LM`: the embedded model, a local folder, or a hub id."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from logging import ERROR, getLogger
from typing import TYPE_CHECKING, Any, Literal

from edit_cli.config.schema import Config, Count, FilePath
from edit_cli.distributed import SINGLE, ProcessGroup
from edit_cli.errors import MissingError, OutOfMemory, UsageError
from edit_cli.files.paths import expanded
from edit_cli.lm.layout import LayoutOptions
from edit_cli.lm.model_files import Source, first_line, resolve
from edit_cli.monitor import Monitor
from edit_cli.wording import many, size

if TYPE_CHECKING:
    import torch

    from edit_cli.lm.model import LM
    from edit_cli.lm.outline import Outline

SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")
PLACEMENT = {  # what transformers and accelerate say of settings that cannot work, and which ones these are
    "dispatched on the CPU or the disk": "quantize with weights that do not fit on the device",
    "offload_folder": "offload_folder=null",
    "device_map": "device_map",
    "on the meta device": "device_map, where parts that share weights (embeddings and head) lie apart,",
    "`size`": "max_memory",
}
UNKNOWN = re.compile(r"model type `(.+?)` but Transformers does not recognize")
SIZE = re.compile(r"\d+(\.\d+)?\s*[KMG]i?B", re.IGNORECASE)


@dataclass(frozen=True)
class ModelOptions(Config):
    """A model, how it is loaded, and what goes with it."""

    place = "model"

    name: str
    """What it is called in the run's path and its tables."""
    id: FilePath
    """owner/name or hub:owner/name on the hub, or a folder that save_pretrained wrote."""
    _: KW_ONLY
    made_for: dict[str, Any] | None = None
    """What config.json says of the model that these settings are for; others are refused (docs/models.md)."""
    revision: str | None = None
    """A commit, tag or branch of the hub's repository; null: its main branch."""
    kind: Literal["auto", "causal", "seq2seq", "classifier", "image"] = "auto"
    """Causal, encoder-decoder, classifier of texts or of images; auto: what its config.json says it was saved as."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """Of the weights; auto: on a GPU that of its files, on a CPU float32. Edits of 16 bits add up in float32."""
    device: str = "auto"
    """auto (cuda, else mps, else cpu), cpu, cuda, cuda:1 or mps."""
    tf32: bool = True
    """Whether a CUDA device multiplies float32 by TF32 in passes of the model, at several times the speed."""
    device_map: str | dict[str, Any] | None = None
    """auto spreads a model over all devices, host memory and disk; or a device, or {module: device, module: disk}."""
    max_memory: dict[str | int, str | int] | None = None
    """What auto may use of each device, such as {0: 20GiB, cpu: 60GiB}; null: all that is free."""
    offload_folder: FilePath | None = None
    """Where weights go for which auto finds no memory, if the model's own files cannot be read in parts."""
    quantize: Literal["4bit", "8bit"] | None = None
    """Matrices in few bits by bitsandbytes, edits beside them (docs/models.md)."""
    trust_remote_code: bool = False
    """Run code that comes with the model: only for repositories that you trust."""
    refuse_too_large: bool = True
    """Whether a model whose weights are larger than the memory that is free is refused before it is loaded."""
    labels: list[str] | None = None
    """Names of a classifier's labels in their order; of a single output, what a negative and a positive one mean; null:
    its config.json's."""
    beams: Count = 1
    """Beams by which an encoder-decoder looks for its replies; 1: greedy, as all other models reply."""
    batch_tokens: Count | None = None
    """Tokens in one forward pass while scoring; null: 2048 on a CPU, else 8192; speed and memory only."""
    records: str | None = None
    """Embedded records that go with the model; null: none, so dataset=counterfact is the published file."""
    corpus: str = "wikipedia"
    """Where second moments come from unless corpus=NAME says otherwise."""
    moment_tokens: Count | Literal["auto"] | None = "auto"
    """What stats.tokens is unless given; null where published settings rest on whole corpora."""
    perplexity_text: FilePath | None = "embedded:prose.txt"
    """What perplexity is measured on: a text of yours, or null to leave it out."""
    default_limit: Count | None = None
    """Records a run scores unless limit says otherwise; null: all of them."""
    layout: LayoutOptions = field(default_factory=LayoutOptions)
    """Names of modules, where discovery is wrong (docs/models.md)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for device, room in (self.max_memory or {}).items():
            if not (device in ("cpu", "mps", "disk") or (type(device) is int and device >= 0)):
                raise UsageError(f"model.max_memory={{{device}: {room}}}: name devices by 0, 1, …, cpu, mps or disk")
            if not (type(room) is int and room >= 0) and not (isinstance(room, str) and SIZE.fullmatch(room)):
                raise UsageError(
                    f"model.max_memory={{{device}: {room}}}: give bytes, or a size with a unit, such as 20GiB"
                )
        if self.max_memory and self.device_map not in SPREADS:
            raise UsageError("model.max_memory says what may be used of each device, so it needs model.device_map=auto")

    def load(self, monitor: Monitor | None = None, process_group: ProcessGroup = SINGLE) -> LM:
        """Load model and tokenizer, to be worked on by the processes of `process_group`.

        Raises:
            MissingError: no such folder or hub id, no network to fetch it, or damaged files; says what was looked for
            and the remedy.
            UsageError: an unknown device, or a model that no editor can be right on. OutOfMemory: it does not
                fit the device.
        """
        from edit_cli.lm.model import LM
        from edit_cli.lm.weights.offload import fetch_again_for_backward
        from edit_cli.lm.weights.quantized import keep_as_loaded

        if self.dtype == "auto":
            return self.settled().load(monitor, process_group)
        place = self._place()
        self.refuse_what_cannot_fit()
        if monitor is not None and (slow := self.emulated()):
            monitor.note(slow)
        source = resolve(self.id, self.revision)
        model, tokenizer = self._read(source, place)
        fetch_again_for_backward(model)
        keep_as_loaded(model)
        tokens, labels = self.batch_tokens, self.labels
        lm = LM(
            model, tokenizer, self.name, source.revision, self.layout, monitor, tokens, self.id, labels, process_group,
            self.quantize,
        )  # fmt: skip
        if self.beams > 1:
            lm.head.reply_by_beams(self.beams)
        if lm.head.vocabulary.strange:
            lm.monitor.note(f"{self.name}: {lm.head.vocabulary}; records that use them are left out")
        return lm

    def settled(self) -> ModelOptions:
        """With the dtype that `auto` stands for on this machine. Raises as `load`."""
        import torch

        if self.dtype != "auto":
            return self
        device = self.target
        saved: Any = None
        if torch.cuda.is_available() if device is None else device.type != "cpu":
            with silent():
                saved = self._config(resolve(self.id, self.revision)).get_text_config().dtype
        if saved == torch.bfloat16:
            return replace(self, dtype="bfloat16")
        return replace(self, dtype="float16" if saved == torch.float16 else "float32")

    def read_kind(self) -> str:
        """The kind of the model by its configuration alone (see `kinds.kind_of`). Raises as `load`."""
        from edit_cli.lm.heads.kinds import kind_of

        source = resolve(self.id, self.revision)
        with silent():
            return kind_of(self._config(source), self.kind)

    @cached_property
    def outline(self) -> Outline | None:
        """The model without its values, as its configuration describes it; None of one whose code cannot make it
        without them. Raises as `load`.
        """
        import torch

        from edit_cli.lm.heads.kinds import auto_class, kind_of
        from edit_cli.lm.outline import outlined
        from edit_cli.lm.weights.quantized import how_to_load, written_in

        if self.dtype == "auto":
            return self.settled().outline
        source = resolve(self.id, self.revision)
        with silent():
            config = self._config(source)
            loader, dtype = auto_class(kind_of(config, self.kind), config, self.id), getattr(torch, self.dtype)
            how_to_load(self.id, self.quantize, dtype, config)  # refuses what cannot be read
            more = {"trust_remote_code": True} if self.trust_remote_code else {}
            quantize = self.quantize or written_in(config)
            try:
                return outlined(loader, config, self.name, self.layout, dtype, quantize, **more)
            except (RuntimeError, NotImplementedError, TypeError):  # it computes while it is made
                return None

    def tokenizer(self) -> Any:
        """Its tokenizer alone, or its image processor. Raises as `load`."""
        source = resolve(self.id, self.revision)
        with silent():
            return self._reader(source, self._config(source))

    def _reader(self, source: Source, config: Any) -> Any:
        from edit_cli.lm.heads.kinds import kind_of, reader_class

        with self._reading("tokenizer"):
            return reader_class(kind_of(config, self.kind)).from_pretrained(source.path, **self._common(source))

    def stops(self) -> list[int]:
        """Ids of the tokens after which it stops writing, as its files say. Raises as `load`."""
        from transformers import GenerationConfig

        source = resolve(self.id, self.revision)
        with silent():
            found = self._config(source).eos_token_id
            with suppress(OSError):  # without such a file, config.json says it
                about: dict[str, Any] = {"revision": source.revision, "local_files_only": source.local}
                found = GenerationConfig.from_pretrained(source.path, **about).eos_token_id
        return [id for id in (found if isinstance(found, list) else [found]) if id is not None]

    @property
    def target(self) -> torch.device | None:
        """The one device that all weights go to; None where they are spread. Raises UsageError: it is not there."""
        place = self._place()
        return None if isinstance(place, str | dict) else place

    def refuse_what_cannot_fit(self) -> None:
        """Refuse a model whose weights alone are larger than what is free on the device that they are to go to.

        Raises:
            OutOfMemory: names the settings that lower the need.
        """
        from edit_cli.lm.memory import free

        device = self.target if self.refuse_too_large else None
        room = None if device is None else free(device)
        if room is None or (outline := self.outline) is None:
            return
        if (need := outline.bytes) > room:
            kind = f"in {self.quantize or self.dtype}"
            raise OutOfMemory(
                f"model.id={self.id} cannot fit: its weights take {size(need)} {kind}, and {size(room)} are free on"
                f" {device}: {self._smaller()}; model.refuse_too_large=false tries all the same"
            )

    def emulated(self) -> str:
        """A line about a dtype that the CPU has no instructions for; empty, where there is nothing to say."""
        import torch

        from edit_cli.lm.precision import EMULATED, slowdown

        device = self.target
        if self.dtype not in ("bfloat16", "float16") or device is None or device.type != "cpu":
            return ""
        if (times := slowdown(getattr(torch, self.dtype))) < EMULATED:
            return ""
        return (
            f"model.dtype={self.dtype} is emulated by this CPU: a product takes about {times:.0f} times as long as in"
            " float32; model.dtype=float32 is faster and takes twice the memory"
        )

    def _smaller(self) -> str:
        """Settings with which the model takes less of its device, as a remedy."""
        ways = [] if self.dtype in ("bfloat16", "float16") or self.quantize else ["model.dtype=bfloat16"]
        ways += [] if self.quantize else ["model.quantize=4bit"]
        ways += ["model.device_map=auto (spreads it over devices, host memory and disk)"]
        ways += [] if self.device == "cpu" else ["model.device=cpu"]
        return f"choose {', '.join(ways[:-1])} or {ways[-1]}, or a smaller model"

    def _config(self, source: Source) -> Any:
        from transformers import AutoConfig

        try:
            with self._reading("config.json"):
                config = AutoConfig.from_pretrained(source.path, **self._common(source))
        except MissingError as error:
            if (found := UNKNOWN.search(str(error))) is None:
                raise
            raise MissingError(
                f"model.id={self.id}: its config.json cannot be read: transformers {version('transformers')} does not"
                f" know the architecture {found[1]}; update transformers, or choose another model"
            ) from None
        self._refuse_other_architecture(config)
        return config

    def _refuse_other_architecture(self, config: Any) -> None:
        """Layers, text and records that go with one model mean nothing on another."""
        wanted = {key: str(value) for key, value in (self.made_for or {}).items()}
        text = config.get_text_config()  # of a model that reads more than text, a part of it
        if wanted != (found := {key: str(getattr(config, key, getattr(text, key, None))) for key in wanted}):
            said = [", ".join(f"{key} {value}" for key, value in values.items()) for values in (wanted, found)]
            raise UsageError(
                f"model.id={self.id} is no {self.name} ({said[0]}): it has {said[1]}; write model=hf"
                f" model.id={self.id}, or give it a name of its own (model.name=NAME) to keep the settings of"
                f" {self.name} all the same"
            )

    def _common(self, source: Source) -> dict[str, Any]:
        """What every part of the model is read with."""
        return {
            "revision": source.revision,
            "trust_remote_code": self.trust_remote_code,
            "local_files_only": source.local,
        }

    def _place(self) -> str | torch.device | dict[str, Any]:
        """Where the weights go: a device, the name of a way to spread them over all devices, or devices of modules
        by name.
        """
        if self.device_map is None:
            return _device("model.device", self.device)
        if self.device_map in SPREADS:
            return self.device_map
        if isinstance(self.device_map, dict):
            _refuse_overlap(list(self.device_map))
            return {
                module: _device_or_disk(f"model.device_map.{module}", place)
                for module, place in self.device_map.items()
            }
        return _device("model.device_map", self.device_map)

    def _read(self, source: Source, place: str | torch.device | dict[str, Any]) -> tuple[Any, Any]:
        import torch

        from edit_cli.lm.heads.kinds import auto_class, kind_of
        from edit_cli.lm.weights.quantized import how_to_load

        common = self._common(source)
        with silent():
            config = self._config(source)
            loader = auto_class(kind_of(config, self.kind), config, self.id)
            tokenizer = self._reader(source, config)
            dtype = getattr(torch, self.dtype)
            # straight to where they are to be: a model larger than the host's memory need not pass through it whole
            how = {
                "dtype": dtype,
                "device_map": place,
                "max_memory": self.max_memory,
                "offload_folder": self.offload_folder and str(expanded(self.offload_folder)),
            }
            how |= {
                "output_loading_info": True,
                "ignore_mismatched_sizes": True,
                **how_to_load(self.id, self.quantize, dtype, config),
            }
            # it looks for an adapter too, where peft is installed
            how["adapter_kwargs"] = {"local_files_only": source.local}
            with self._reading("weights"):
                model, found = loader.from_pretrained(source.path, config=config, **how, **common)
        if isinstance(place, dict) and (unknown := [name for name in place if not _has(model, name)]):
            raise UsageError(f"model.device_map.{unknown[0]} names no module of this model")
        for problem, names in (
            ("missing", found["missing_keys"]),
            ("of another shape", [name for name, *_ in found["mismatched_keys"]]),
        ):
            if names:
                raise MissingError(
                    f"model.id={self.id}: {many(len(names), 'weight is', 'weights are')} {problem} in its files, such"
                    f" as {min(names)}"
                )
        return model, tokenizer

    @contextmanager
    def _reading(self, part: str) -> Iterator[None]:
        """Name the part that cannot be read: the libraries raise anything from OSError to a bare Exception on
        damaged files.
        """
        import torch

        try:
            yield
        except torch.OutOfMemoryError:
            raise OutOfMemory(
                f"model.id={self.id} does not fit the device's memory in {self.dtype}: {self._smaller()}"
            ) from None
        except Exception as error:
            if isinstance(error, ValueError) and "trust_remote_code" in str(error):
                raise UsageError(
                    f"model.id={self.id} comes with code of its own, which is not run unless it is asked for: give"
                    " model.trust_remote_code=true (apply: --trust-remote-code), if you trust it"
                ) from None
            if isinstance(error, ValueError) and (
                about := next((word for word in PLACEMENT if word in str(error)), None)
            ):
                raise UsageError(
                    f"model.{PLACEMENT[about]} does not work for model.id={self.id}: {first_line(error)[:200]}"
                ) from error
            raise MissingError(f"model.id={self.id}: its {part} cannot be read: {first_line(error)}") from error


def _has(model: Any, name: str) -> bool:
    """Whether it is the name of a module or a parameter."""
    return name in dict(model.named_modules()) or name in dict(model.named_parameters(remove_duplicate=False))


def _device(key: str, name: str) -> torch.device:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        found = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        found = None
    if found is None or found.type == "meta":  # meta holds shapes and no values
        raise UsageError(f"{key}={name} is not available here; choose auto or cpu")
    return found


def _refuse_overlap(modules: list[str]) -> None:
    for outer in modules:
        for inner in modules:
            if inner != outer and (not outer or inner.startswith(f"{outer}.")):
                raise UsageError(f"model.device_map names {inner} and {outer or 'all'} around it: name every part once")


def _device_or_disk(key: str, name: Any) -> str:
    """A device by its name or its number, or `disk`."""
    return name if name == "disk" else str(_device(key, f"cuda:{name}" if isinstance(name, int) else str(name)))


@contextmanager
def silent() -> Iterator[None]:
    """Without the progress bars and reports of libraries: errors say what is wrong, and the console draws progress."""
    from transformers.utils import logging

    offloading = getLogger("accelerate.big_modeling")  # says what is on the disk
    verbosity, bars, level = logging.get_verbosity(), logging.is_progress_bar_enabled(), offloading.level
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    offloading.setLevel(ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The following device_map keys")  # refused in our own words
            yield
    finally:
        logging.set_verbosity(verbosity)
        offloading.setLevel(level)
        if bars:
            logging.enable_progress_bar()
