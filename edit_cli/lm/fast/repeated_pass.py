"""A pass again and again while one module's output changes: whatever ends before that module begins is the same each
time, so it is kept.

No family needs code of its own: the model's own forward runs, and its parts that are known return what they returned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn

KEPT = 2**30  # bytes of states that are kept beside a model
Found = TypeVar("Found")


@dataclass
class ForwardCache:
    """What one pass left.

    kept: (module, its output), outermost modules that ended before `until` did, and `until` itself.
    """

    until: nn.Module
    kept: list[tuple[nn.Module, Any]] = field(default_factory=list)
    calls: Counter[nn.Module] = field(default_factory=Counter)
    _begun: dict[nn.Module, int] = field(default_factory=dict)
    _versions: dict[nn.Module, int] = field(default_factory=dict)
    _over: bool = False

    def begins(self, module: nn.Module, _: Any) -> None:
        self.calls[module] += 1
        self._begun[module] = len(self.kept)

    def ends(self, module: nn.Module, _: Any, output: Any) -> None:
        if self._over or self.calls[module] > 1:
            return
        self.kept[self._begun[module] :] = [(module, output)]
        self._versions[module] = _version(output)
        self._over = module is self.until

    @property
    def lasting(self) -> list[tuple[nn.Module, Any]]:
        """Those that may be handed out again: of modules that ran once in the pass, and not written to since."""
        return [(m, out) for m, out in self.kept if self.calls[m] == 1 and _version(out) == self._versions[m]]

    @property
    def bytes(self) -> int:
        """Of what is kept; parts that modules share count each time."""
        return sum(part.nbytes for _, output in self.kept for part in _tensors(output))

    @contextmanager
    def constant(self, inclusive: bool = True) -> Iterator[None]:
        """The kept modules cost nothing. inclusive: `until` is one of them; else it is run.

        Only the instances' `forward` is replaced, and put back; hooks on them run as ever.
        """
        with ExitStack() as stack:
            for module, output in self.lasting:
                if module is self.until and not inclusive:
                    continue
                stack.callback(_put_back, module, module.__dict__.get("forward"))
                module.forward = _giving(output)
            yield


@contextmanager
def recorded(model: nn.Module, until: nn.Module) -> Iterator[ForwardCache]:
    """Keep what the modules of `model` return in the one pass that is run inside the block, before hooks that others
    have set.
    """
    found = ForwardCache(until)
    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(module.register_forward_pre_hook(found.begins, prepend=True).remove)
            stack.callback(module.register_forward_hook(found.ends, prepend=True).remove)
        yield found


class RepeatedPasses:
    """Passes of the same rows again and again while `first` and what comes after it change: what ends before `first`
    begins is run once for all of them, as far as `KEPT` bytes hold it.
    """

    def __init__(self, model: nn.Module, first: nn.Module) -> None:
        self.model, self.first, self.room = model, first, KEPT
        self.known: dict[Hashable, ForwardCache] = {}  # by rows

    def run(self, rows: Hashable, run: Callable[[], Found], holds: Callable[[ForwardCache, Found], bool]) -> Found:
        """What `run()`, a pass of these rows, returns.

        holds: asked of the first pass and what it left, whether others may go on from it; not so in a family whose
        passes hang on more than its modules' outputs.
        """
        if rows in self.known:
            with self.known[rows].constant(inclusive=False):
                return run()
        if self.room <= 0:
            return run()
        with recorded(self.model, self.first) as cache:
            found = run()
        if not self.known and not holds(cache, found):
            self.room = 0
        self.room -= cache.bytes
        if self.room > 0:
            self.known[rows] = cache
        return found


def _giving(output: Any) -> Callable[..., Any]:
    return lambda *_, **__: output


def _put_back(module: nn.Module, forward: Any) -> None:
    if forward is None:
        del module.forward
    else:
        module.forward = forward  # accelerate sets one of its own for offloaded modules


def _version(output: Any) -> int:
    """Rises when one of its tensors is written to in place."""
    return sum(part._version for part in _tensors(output))


def _tensors(output: Any) -> Iterator[Tensor]:
    """Of what a module returned."""
    if isinstance(output, Tensor):
        yield output
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
    for part in parts:
        yield from _tensors(part)
