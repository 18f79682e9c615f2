"""Repositories of models on the Hugging Face hub: what is fetched from one, and what goes there.

An address is `hub:owner/name[@revision][:folder]`. The hub is the one that `HF_ENDPOINT` names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edit_cli.errors import MissingError, UsageError
from edit_cli.files.paths import expanded

PREFIX = "hub:"
ADDRESS = re.compile(r"hub:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+?))?(:(?P<folder>[\w.-][\w./ -]*))?")
CACHED = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)/snapshots/(?P<commit>[0-9a-f]{40})(?=/|$)")
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
WRITE = "a token that may write"
Content = bytes | Path


@dataclass(frozen=True)
class Address:
    """A folder of a repository; the whole of it without `folder`."""

    repo: str
    revision: str | None = None
    folder: str | None = None

    @classmethod
    def parse(cls, text: str, key: str) -> Address:
        """Raises UsageError: it is none; `key` is what it was given as."""
        match = ADDRESS.fullmatch(text)
        if not match or ".." in re.split(r"[/:@]", text):
            raise UsageError(f"{key}{text}: write hub:owner/name, or hub:owner/name@revision:folder")
        return cls(match["repo"], match["revision"], match["folder"] and match["folder"].strip("/"))

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{PREFIX}{self.repo}{revision}{f':{self.folder}' if self.folder else ''}"

    def inside(self, name: str) -> str:
        """The path of a file in the repository."""
        return f"{self.folder}/{name}" if self.folder else name


def is_address(place: str | Path) -> bool:
    return str(place).startswith(PREFIX)


def known_as(place: str, revision: str | None = None) -> tuple[str | None, str | None]:
    """(owner/name, revision) by which others find what lies there: an id or address of the hub, or a folder of its
    cache; (None, None) of any other folder.
    """
    if is_address(place):
        address = Address.parse(place, "")
        return address.repo, revision or address.revision
    if found := CACHED.search(place):
        return f"{found['owner']}/{found['name']}", found["commit"]
    return (None, None) if expanded(place).is_absolute() or expanded(place).is_dir() else (place, revision)


def here(place: str | Path, names: Sequence[str], key: str = "") -> Path:
    """A folder of this machine: as `expanded`, and one of the hub once the files that are wanted of it are fetched.

    Args:
        place: a path, or an address.
        names: of the files, at any depth; nothing else is fetched.
        key: what the place was given as, for messages, such as `base_edit=`.

    Raises:
        UsageError: no address. MissingError: it is not there, or the hub cannot be reached and its cache lacks it.
    """
    if not is_address(place):
        return expanded(place)
    address = Address.parse(str(place), key)
    folder = fetched(address, [f"*{name}" for name in names], key)
    if not folder.is_dir() or not any(folder.iterdir()):
        raise MissingError(f"{key}{address} holds none of {', '.join(names)}")
    return folder


def fetched(address: Address, patterns: Sequence[str], key: str) -> Path:
    """The folder with copies of the files that fit the patterns, where there are any. Raises as `here`."""
    with _telling(f"{key}{address}"):
        wanted = list(map(address.inside, patterns))
        found = _api().snapshot_download(address.repo, revision=address.revision, allow_patterns=wanted)
    return Path(found, *(address.folder or "").split("/"))


def push(
    files: Mapping[str, Content], to: Address, message: str, private: bool | None = None, update: bool = False
) -> str:
    """Commit files to a repository, which is made first; the address of the commit.

    Args:
        files: {path: what it holds, or the file that does}.
        to: where; its revision is a branch, which is made where it is not there.
        message: of the commit.
        private: whether only its owner sees it; None: as the owner's settings have it.
        update: the repository is there already.

    Raises:
        MissingError: no token, none that may do so, the name is taken, there is no such repository, or the hub cannot
            be reached.
    """
    from huggingface_hub import CommitOperationAdd, get_token

    if get_token() is None:
        raise MissingError(f"{to}: the hub takes nothing without a token: {LOG_IN} to {WRITE}")
    api = _api()
    with _telling(str(to), written=True):
        if not update:
            api.create_repo(to.repo, private=private)
        elif private is not None:
            raise UsageError("--private is of a repository that is made; --update adds to one that is there")
        if to.revision:
            api.create_branch(to.repo, branch=to.revision, exist_ok=True)
        done = api.create_commit(
            to.repo,
            [CommitOperationAdd(to.inside(name), held) for name, held in files.items()],
            commit_message=message,
            revision=to.revision,
        )
    return str(done.commit_url)


def _api() -> Any:
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # the monitor tells how long it takes
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, library_name="edit-cli")


@contextmanager
def _telling(what: str, written: bool = False) -> Iterator[None]:
    """Whatever the hub or the way to it has against the block is told in a line.

    Raises:
        MissingError: says what, and what to do about it.
    """
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except (MissingError, UsageError):
        raise
    except HFValidationError as error:
        raise UsageError(f"{what}: {_first_line(error)}") from None
    except GatedRepoError:
        raise MissingError(f"{what} is gated: accept its license on the hub, and {LOG_IN}") from None
    except RepositoryNotFoundError as error:
        if error.response.status_code == 401 and written:
            raise MissingError(f"{what}: the hub does not know the token: {LOG_IN} to {WRITE}") from None
        private = "" if written else f" (if it is private, {LOG_IN})"
        raise MissingError(f"{what}: the hub has no such repository{private}") from None
    except RevisionNotFoundError:
        raise MissingError(f"{what}: the repository has no such revision") from None
    except LocalEntryNotFoundError as error:
        raise MissingError(_unreached(what, error)) from None
    except EntryNotFoundError as error:
        raise MissingError(f"{what}: {_first_line(error)}") from None
    except HfHubHTTPError as error:
        raise MissingError(f"{what}: {_refusal(error)}") from None
    except OfflineModeIsEnabled:
        raise MissingError(
            f"{what}: HF_HUB_OFFLINE is set, so the hub is not asked, and its cache lacks this"
        ) from None
    except OSError as error:
        raise MissingError(_unreached(what, error)) from None
    except Exception as error:  # whatever the transport raises without a network
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3")):
            raise
        raise MissingError(_unreached(what, error)) from None


def _refusal(error: Any) -> str:
    """What an answer of the hub means."""
    code = error.response.status_code
    said = {
        401: f"the hub does not know the token: {LOG_IN} to {WRITE}",
        403: f"the hub does not let this token do that: {LOG_IN} to {WRITE} to this owner's repositories",
        409: "the name is taken: choose another one, or add a commit to what is there with --update",
        429: "the hub has been asked too often: try again later",
    }
    return said.get(code, f"the hub answers {code}: {_first_line(error)}")


def _unreached(what: str, error: Exception) -> str:
    cause = error.__cause__ or error
    return f"{what}: the hub cannot be reached ({type(cause).__name__}); try again, or give a local folder"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
