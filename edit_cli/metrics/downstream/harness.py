"""lm-evaluation-harness: its tasks, and a model with its edits as it wants to ask one."""

from __future__ import annotations

import difflib
import importlib.util
import io
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from edit_cli.errors import EditCliError, MissingError, RejectedRequest, UsageError
from edit_cli.lm.loading import silent
from edit_cli.metrics.downstream import world_choice
from edit_cli.metrics.downstream.flips import Item
from edit_cli.metrics.downstream.options import DownstreamOptions
from edit_cli.writing import JOINER

if TYPE_CHECKING:
    from edit_cli.lm.model import LM

LIBRARY = "lm_eval"
CHUNK = 1024  # rows a call: between calls progress is told
TIMEOUT = 5.0  # seconds that the hub has to answer
NEW_TOKENS = 256  # of a text whose task does not say how long it may be
SHOT_SEED = 1234  # of which examples stand before an item, as the library has it


@dataclass(frozen=True)
class Harness:
    """The tasks that are chosen, with their data, which are read once."""

    options: DownstreamOptions

    def require(self, kind: str, model: str) -> None:
        """Refuse what cannot be asked, before the model is loaded.

        Raises:
            MissingError: the library, or a task's data, is not here. UsageError: there is no such task, or this kind
                of model does not write.
        """
        if kind == "classifier":
            raise UsageError(
                f"protocol.downstream: {model} is a classifier, and these tasks are for models that write: leave it out"
            )
        if importlib.util.find_spec(LIBRARY) is None:
            raise MissingError(
                "protocol.downstream needs lm-evaluation-harness: pip install 'edit-cli[downstream]', or leave it out"
            )
        _ = self.tasks

    @cached_property
    def tasks(self) -> dict[str, dict[str, Any]]:
        """{name that was asked for: {task: the library's task}}; a group has several. Raises as `require`."""
        with quiet():
            from lm_eval.tasks import TaskManager

            others = set(self.options.downstream) - {world_choice.NAME}
            try:  # the library's own are thousands of files
                manager = TaskManager(include_path=self.options.downstream_path, include_defaults=bool(others))
            except Exception as error:
                raise MissingError(
                    f"protocol.downstream_path={self.options.downstream_path} cannot be read: {_line(error)}"
                ) from None
            return {name: self._loaded(manager, name) for name in self.options.downstream}

    def _loaded(self, manager: Any, name: str) -> dict[str, Any]:
        own = name == world_choice.NAME
        if not own and name not in manager.all_tasks:
            near = difflib.get_close_matches(name, [*manager.all_tasks, world_choice.NAME], 3)
            raise UsageError(
                f"protocol.downstream: {name} is no task of lm-evaluation-harness"
                + (f" (is it {' or '.join(near)}?)" if near else "")
                + "; tasks of yours lie in protocol.downstream_path"
            )
        try:
            with nullcontext() if own else hub_or_cache():
                tasks = manager.load([world_choice.task() if own else name])["tasks"]
        except Exception as error:  # whatever a task's code and the hub raise
            raise MissingError(
                f"protocol.downstream: the data of {name} cannot be had ({_line(error)}); {world_choice.NAME} needs no"
                " network"
            ) from None
        for task in tasks.values():
            if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                raise UsageError(
                    f"protocol.downstream: {name} runs what models write, or shows them pictures: leave it out"
                )
        return tasks

    def ask(self, lm: LM) -> dict[str, list[Item]]:
        """What the model, with all edits that are attached, answers to every item, by the names that were asked for.

        Raises:
            MissingError: a task cannot be asked; names it.
        """
        with quiet():
            from lm_eval.evaluator import evaluate

            whole = {task: made for tasks in self.tasks.values() for task, made in tasks.items()}
            for task in whole.values():
                shots = self.options.downstream_shots
                if shots is not None or task.get_config("num_fewshot") is None:
                    task.set_config(key="num_fewshot", value=shots or 0)
                task.set_fewshot_seed(seed=SHOT_SEED)
            try:
                found = evaluate(
                    asked_by_harness(lm),
                    {"tasks": whole, "groups": {}, "group_map": {}},
                    limit=self.options.downstream_limit,
                    bootstrap_iters=0,
                )
            except (EditCliError, MemoryError):
                raise
            except (ValueError, KeyError, TypeError, NotImplementedError) as error:
                raise MissingError(
                    f"protocol.downstream: lm-evaluation-harness cannot ask {', '.join(whole)}: {_line(error)}"
                ) from error
        samples = found["samples"]
        return {
            name: [item for task in tasks for item in _items(task, samples[task])] for name, tasks in self.tasks.items()
        }


def _items(task: str, samples: Sequence[dict[str, Any]]) -> list[Item]:
    """The items of a task; where answers are read in several ways (filters), metrics are named by them."""
    ways = {sample["filter"] for sample in samples}
    items: dict[int, Item] = {}
    for sample in samples:
        values = items.setdefault(sample["doc_id"], Item(task=task, item=sample["doc_id"], values={}))["values"]
        for metric in sample["metrics"]:
            name = metric if len(ways) == 1 else f"{metric}, {sample['filter']}"
            value = sample[metric]
            if isinstance(value, tuple):  # of a text: its log-likelihood, and its words or bytes
                values[f"{name}, nats each"] = -value[0] / max(value[1], 1)
            elif isinstance(value, bool | int | float) or hasattr(value, "item"):
                values[name] = float(value)
    return list(items.values())


def asked_by_harness(lm: LM) -> Any:
    """`lm`, with whatever is attached to it, as the library's own kind of model."""
    from lm_eval.api.model import LM as Asked

    class Edited(Asked):  # the base class is there only where the library is
        """Scores are sums of log-likelihoods, texts are greedy; rows are shared among processes."""

        def __init__(self) -> None:
            super().__init__()
            self.rows = Rows(lm)

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            return self.rows.told("scoring tasks", [request.args for request in requests], self.rows.scores)

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            return self.rows.told("writing answers", [request.args for request in requests], self.rows.texts)

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            return self.rows.told("scoring texts", [request.args for request in requests], self.rows.whole_texts)

    return Edited()


class Rows:
    """The library's requests in this package's words."""

    def __init__(self, lm: LM) -> None:
        self.lm, self.cut = lm, 0

    def told(self, what: str, rows: Sequence[Any], ask: Callable[[Sequence[Any]], list[Any]]) -> list[Any]:
        """Answers in order, with progress; each process asks a share."""
        group, mine = self.lm.process_group, self.lm.process_group.share(list(rows))
        found: list[Any] = []
        with redirect_stderr(getattr(sys.stderr, "outside", sys.stderr)), self.lm.monitor.task(what, len(mine)) as done:
            for first in range(0, len(mine), CHUNK):
                part = mine[first : first + CHUNK]
                found += ask(part)
                done(len(part))
            if self.cut:
                self.lm.monitor.note(
                    f"{self.cut:,} prompts of tasks are longer than the model's context; their beginnings are left out"
                )
        return group.gather(found)

    def scores(self, rows: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation, whether it is the likeliest token by token) of each row."""
        pairs = []
        for context, continuation in rows:
            target = continuation if continuation[:1] == " " else JOINER + continuation
            pairs.append((self.fitting(context, self.count(continuation) + 2), target))
        return [(-score.nll * len(score.hits), all(score.hits)) for score in self.lm.loglikelihood(pairs)]

    def texts(self, rows: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        """What the model writes greedily, up to a text that ends it (`until`) or `max_gen_toks` tokens."""
        found = [""] * len(rows)
        by_kind: dict[tuple[int, bool], list[int]] = {}
        for index, (_, asked) in enumerate(rows):
            room = int(asked.get("max_gen_toks") or asked.get("max_length") or NEW_TOKENS)
            by_kind.setdefault((room, "\n" in _until(asked)), []).append(index)
        for (room, one_line), which in by_kind.items():
            room = min(room, self.lm.head.max_length // 2)
            prompts = [self.fitting(rows[i][0], room + 2) for i in which]
            written = self.lm.generate(prompts, room) if one_line else self.long(prompts, room)
            for index, text in zip(which, written, strict=True):
                ends = [at for stop in _until(rows[index][1]) if stop and (at := text.find(stop)) >= 0]
                found[index] = text[: min(ends)] if ends else text
        return found

    def long(self, prompts: Sequence[str], room: int) -> list[str]:
        """Texts of several lines: the likeliest of one token is greedy sampling."""
        tokenizer = self.lm.tokenizer
        longest = max(map(self.count, prompts))
        total = min(longest + room, self.lm.head.max_length)
        wholes = self.lm.sample(prompts, [0] * len(prompts), total, 1)
        found = []
        for prompt, whole in zip(prompts, wholes, strict=True):
            ids = tokenizer(whole[len(prompt.rstrip(" ")) :], add_special_tokens=False)["input_ids"][:room]
            found.append(tokenizer.decode(ids, skip_special_tokens=True))
        return found

    def whole_texts(self, rows: Sequence[tuple[str]]) -> list[float]:
        """Log-likelihood of each text; routes answer prompts, so they play no part."""
        return [-self.lm.token_nlls([text], self.lm.head.max_length)[0] for (text,) in rows]

    def fitting(self, context: str, room: int) -> str:
        """The context, without its beginning where the model's own does not hold it and `room` tokens; the token that
        begins a text where it is empty.
        """
        tokenizer, most = self.lm.tokenizer, self.lm.head.max_length - room
        if not context.strip(" "):
            return tokenizer.bos_token or tokenizer.eos_token or "\n"
        if most < 1:
            raise RejectedRequest(
                f"an answer of a downstream task is longer than the model's context: {context[:60]!r}…"
            )
        offsets = tokenizer(context, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
        if len(offsets) <= most:
            return context
        self.cut += 1
        return context[offsets[len(offsets) - most][0] :]

    def count(self, text: str) -> int:
        return len(self.lm.tokenizer(text, add_special_tokens=False)["input_ids"])


def _until(asked: dict[str, Any]) -> list[str]:
    until = asked.get("until") or []
    return [until] if isinstance(until, str) else list(until)


@contextmanager
def hub_or_cache() -> Iterator[None]:
    """Where the hub does not answer, data that lie here are taken, without minutes of retries for others."""
    import datasets
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    switches = ((constants, "HF_HUB_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE"))
    before = [getattr(module, name) for module, name in switches]
    try:
        get_hf_file_metadata(hf_hub_url("openai-community/gpt2", "config.json"), timeout=TIMEOUT)
        there = True
    except Exception:  # whatever the transport raises without a network
        there = False
    try:
        for module, name in () if there else switches:
            setattr(module, name, True)
        yield
    finally:
        for (module, name), value in zip(switches, before, strict=True):
            setattr(module, name, value)


class Unseen(io.StringIO):
    """Takes what a library writes to standard error. outside: standard error as it was."""

    def __init__(self) -> None:
        super().__init__()
        self.outside = sys.stderr


@contextmanager
def quiet() -> Iterator[None]:
    """Without the library's bars and reports."""
    logger = logging.getLogger(LIBRARY)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with silent(), redirect_stderr(Unseen()):
            yield
    finally:
        logger.setLevel(level)


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
