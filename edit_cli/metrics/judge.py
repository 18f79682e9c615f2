"""A language model as judge: whether a reply says what is wanted, in whatever words.

Any OpenAI-compatible endpoint that the user names, never one by default. Its answers are kept on disk, so that nothing
is asked twice, and a run that goes on, or is made again, has the same numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from edit_cli.config.schema import Config, Count, FilePath, Linked, NonNegative, Positive
from edit_cli.errors import MissingError, UsageError
from edit_cli.files.disk import telling
from edit_cli.files.paths import expanded
from edit_cli.monitor import Monitor

SYSTEM = (
    "A language model was given a text and went on with a reply. You are told, as JSON, the text, the wanted answers"
    " and the reply. Does the reply say one of the wanted answers, in whatever words, as its answer to the text or as"
    " what comes next in it? Write yes or no, and nothing else."
)
THOUGHTS = re.compile(r"<think>.*?</think>", re.DOTALL)
VERDICTS = {"yes": True, "no": False}
BUSY = (429, 500, 502, 503, 504)  # statuses that pass
TRIES, BACKOFF = 4, 0.5  # seconds before the second try, doubled before each further one
SHOWN = 200  # characters of an endpoint's complaint


class Question(NamedTuple):
    """What is to be judged. wanted: the target and its aliases."""

    prompt: str
    wanted: tuple[str, ...]
    reply: str


TRIAL = Question("The capital of France is", ("Paris",), "the city of Paris")


@dataclass(frozen=True, kw_only=True)
class JudgeOptions(Config):
    """A model that judges what the edited one writes."""

    place = "protocol.observe.judge"

    model: str | None = None
    """Name of a model that judges whether a reply says what is wanted, at an address of yours; null: none does."""
    url: str | None = None
    """Address of an OpenAI-compatible API that has it, such as http://localhost:8000/v1."""
    key: str | None = None
    """Environment variable with the key for it, given on the command line only; null: it wants none."""
    temperature: NonNegative | None = 0.0
    """Of its answers; null: what the endpoint thinks best."""
    at_once: Count = 8
    """Questions that are put to it at the same time."""
    timeout: Positive = 60.0
    """Seconds that an answer may take."""
    cache_dir: Annotated[FilePath, Linked("${cache_dir}/judge")] = "~/.cache/edit-cli/judge"
    """Folder in which its answers are kept, so that nothing is asked twice."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is None:
            if self.url is not None or self.key is not None:
                raise UsageError(f"{self.place}.model has no value: name the model that is to judge")
        elif not re.match(r"https?://\S", self.url or ""):
            raise UsageError(
                f"{self.place}.url={self.url or 'null'}: give the address of an OpenAI-compatible API that has"
                f" {self.model}, such as http://localhost:8000/v1"
            )

    def require(self) -> None:
        """Refuse a key that is not there. Raises MissingError."""
        if self.key is not None and not os.environ.get(self.key):
            raise MissingError(f"{self.place}.key={self.key}: no environment variable of that name is set")

    def try_out(self) -> None:
        """Ask one question whose answer is known, before hours are spent. Raises as `verdicts`."""
        if self.model is not None:
            self.verdicts([TRIAL], Monitor())

    def verdicts(self, questions: Iterable[Question], monitor: Monitor) -> dict[Question, bool | None]:
        """{question: whether the reply says it}; None where the judge answered neither yes nor no.

        Raises:
            MissingError: the endpoint cannot be reached or refuses; what it has answered is kept. As `require`.
        """
        asked = list(dict.fromkeys(questions))
        if self.model is None or not asked:
            return {}
        with closing(_Answers(expanded(self.cache_dir), self.url)) as kept:
            found = {question: kept.get(self._told(question)) for question in asked}
            new = [question for question, answer in found.items() if answer is None]
            with monitor.task("judging", len(new)) as advance:
                for question, answer in self._answers(new):
                    kept.put(self._told(question), answer)
                    found[question] = answer
                    advance(1)
        return {question: _verdict(answer or "") for question, answer in found.items()}

    def _told(self, question: Question) -> dict[str, Any]:
        """What is sent: the question, and nothing else of the run."""
        told = {"text": question.prompt, "wanted": list(question.wanted), "reply": question.reply}
        said = json.dumps(told, ensure_ascii=False)
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": said}]
        options = {} if self.temperature is None else {"temperature": self.temperature}
        return {"model": self.model, "messages": messages, **options}

    def _answers(self, questions: Sequence[Question]) -> Iterator[tuple[Question, str]]:
        """What the endpoint says to each, as it comes. Where it fails, nothing new is asked, and what is still coming
        is waited for: it may have been paid for.
        """
        if not questions:
            return
        self.require()
        failed: MissingError | None = None
        pool = ThreadPoolExecutor(self.at_once)
        try:
            asking = {pool.submit(self._answer, self._told(question)): question for question in questions}
            for done in as_completed(asking):
                try:
                    yield asking[done], done.result()
                except CancelledError:
                    continue
                except MissingError as error:
                    failed = failed or error
                    for other in asking:
                        other.cancel()
        finally:
            pool.shutdown(cancel_futures=True)
        if failed:
            raise failed

    def _answer(self, told: Mapping[str, Any]) -> str:
        said = self._asked(json.dumps(told).encode())
        try:
            content = json.loads(said)["choices"][0]["message"]["content"]
        except ValueError:
            raise self._failed("does not answer in JSON") from None
        except (KeyError, IndexError, TypeError):
            raise self._failed("answers in another form than OpenAI's chat completions") from None
        if not isinstance(content, str):
            raise self._failed("answers without a text")
        return content

    def _asked(self, body: bytes) -> bytes:
        """What the endpoint answers, which is asked again where it is busy or out of reach for a moment."""
        headers = {"Content-Type": "application/json"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {os.environ[self.key]}"
        request = Request(f"{str(self.url).rstrip('/')}/chat/completions", body, headers)
        for pause in (*(BACKOFF * 2**number for number in range(TRIES - 1)), None):
            try:
                with build_opener(_NoRedirect).open(request, timeout=self.timeout) as answer:
                    return answer.read()
            except HTTPError as error:
                with error:
                    complaint = " ".join(error.read().decode(errors="replace").split())[:SHOWN]
                why, passes = f"answers {error.code} {error.reason}: {complaint}", error.code in BUSY
            except (OSError, HTTPException) as error:
                reason = getattr(error, "reason", error)
                why, passes = f"cannot be reached: {getattr(reason, 'strerror', None) or reason}", True
            if pause is None or not passes:
                break
            time.sleep(pause)
        raise self._failed(why)

    def _failed(self, why: str) -> MissingError:
        return MissingError(
            f"{self.place}: {self.model} at {self.url} {why}; what it has answered so far is kept, and the same command"
            " goes on from there"
        )


def _verdict(answer: str) -> bool | None:
    """What an answer comes to; a model may think aloud before it."""
    first = re.search(r"[^\W\d_]+", THOUGHTS.sub("", answer))
    return VERDICTS.get(first[0].lower()) if first else None


class _NoRedirect(HTTPRedirectHandler):
    """A key goes where the user sends it, and nowhere else."""

    def redirect_request(self, *_: Any) -> None:
        return None


class _Answers:
    """What the judges of an endpoint have answered, by all that was sent to them; several processes may add to it."""

    def __init__(self, folder: Path, url: str | None) -> None:
        self.file, self._url = folder / "answers.sqlite", url
        with telling(f"{JudgeOptions.place}.cache_dir={folder}"):
            folder.mkdir(parents=True, exist_ok=True)
        self._store = sqlite3.connect(self.file, timeout=60, isolation_level=None)
        self._do("CREATE TABLE IF NOT EXISTS answers (asked TEXT PRIMARY KEY, answer TEXT NOT NULL)")

    def get(self, told: Mapping[str, Any]) -> str | None:
        row = self._do("SELECT answer FROM answers WHERE asked = ?", self._digest(told)).fetchone()
        return None if row is None else str(row[0])

    def put(self, told: Mapping[str, Any], answer: str) -> None:
        self._do("INSERT OR IGNORE INTO answers VALUES (?, ?)", self._digest(told), answer)

    def close(self) -> None:
        self._store.close()

    def _do(self, statement: str, *values: str) -> sqlite3.Cursor:
        try:
            return self._store.execute(statement, values)
        except sqlite3.Error as error:
            raise MissingError(
                f"{self.file} cannot be used ({error}): delete it, or name another folder by"
                f" {JudgeOptions.place}.cache_dir=DIR"
            ) from None

    def _digest(self, told: Mapping[str, Any]) -> str:
        return hashlib.sha256(json.dumps({"url": self._url, **told}, sort_keys=True).encode()).hexdigest()
