"""Values of the unedited model on disk. What is done with them (λ, the layers below, how many facts are solved at once)
can be tried many times; the search for them, which is most of an edit's time, is then made once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

from torch import Tensor

from edit_cli.errors import MissingError
from edit_cli.files import shapes
from edit_cli.files.described import Damaged, read_described, write_described
from edit_cli.files.disk import require_folder
from edit_cli.files.paths import expanded
from edit_cli.files.tensors import are_finite, fitted, size
from edit_cli.statistics.files import digest_of, model_identity, slug

if TYPE_CHECKING:
    from edit_cli.editors.locate.value_batch import ValueConfig
    from edit_cli.lm.model import LM

FORMAT = 1
REMEDY = "it is looked for again"
ROOM_ONLY = ("reuse", "cache_dir", "batch_tokens")  # settings that a value does not hang on


class Value(NamedTuple):
    """A target state v_0 + δ, where it started (d,), its final loss, the number of forward passes, whether it was good
    enough before they were used up, and whether an earlier run had found it.
    """

    target: Tensor
    initial: Tensor
    loss: float
    steps: int
    reached: bool
    taken: bool = False


class About(TypedDict):
    """What the file of a value says of it."""

    loss: float
    steps: shapes.Count
    reached: bool


class ValueStore:
    """The values that one search setting gives on one model at one place; each has a file, named by what it hangs on.

    Raises:
        MissingError: the folder cannot be made or written to.
    """

    def __init__(self, lm: LM, layer: int, site: str, options: ValueConfig) -> None:
        self.lm = lm
        self.folder = expanded(options.cache_dir) / slug(lm.name)
        self.setting = f"method.value.cache_dir={options.cache_dir}"
        self.search = {
            "model": model_identity(lm),
            "layer": layer,
            "site": site,
            "options": {name: told for name, told in asdict(options).items() if name not in ROOM_ONLY},
        }
        require_folder(self.folder, self.setting)

    def taken(self, asked: Sequence[Any]) -> list[Value | None]:
        """Those that are there. asked: of each value, the tokens that are read to find it, as JSON takes them.

        A damaged file is told, and counts as none.
        """
        return [self._read(self._path(each)) for each in asked]

    def keep(self, asked: Sequence[Any], values: Sequence[Value]) -> None:
        """Write values that a search came to; readers see the whole of one or none of it.

        Raises:
            MissingError: the disk does not take it.
        """
        for each, value in zip(asked, values, strict=True):
            if not math.isfinite(value.loss):
                continue
            about: About = {"loss": value.loss, "steps": value.steps, "reached": value.reached}
            tensors = {"target": value.target, "initial": value.initial}
            write_described(self._path(each), tensors, about, FORMAT, self.setting)

    def _path(self, asked: Any) -> Path:
        return self.folder / f"{digest_of({**self.search, 'asked': asked})[:32]}.safetensors"

    def _read(self, path: Path) -> Value | None:
        width = self.lm.layout.width
        try:
            tensors, said = read_described(path, FORMAT, REMEDY)
            about: About = shapes.checked(said, About, path, REMEDY)
            fitted(tensors, {"target": size(width), "initial": size(width)}, path, REMEDY)
            if not are_finite(tensors):
                raise Damaged("not all numbers are finite")
        except FileNotFoundError:
            return None
        except (Damaged, MissingError) as error:
            self.lm.monitor.note(str(error) if isinstance(error, MissingError) else f"{path}: {error}; {REMEDY}")
            return None
        return Value(tensors["target"], tensors["initial"], about["loss"], about["steps"], about["reached"], taken=True)
