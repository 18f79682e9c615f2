"""One file of a dataset repository on the Hugging Face hub, through the hub's own cache."""

from __future__ import annotations

import re
from pathlib import Path

from edit_cli.datasets.records.reading import FORMATS
from edit_cli.errors import MissingError, UsageError
from edit_cli.monitor import Monitor

TIMEOUT = 10  # seconds
ADDRESS = re.compile(r"hub:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<file>[^:]+))?")


def from_hub(address: str, monitor: Monitor, key: str) -> tuple[Path, str]:
    """The local copy of `hub:owner/name[@revision][:file]`, and its address with the commit.

    Without the hub, what its cache holds.

    Raises:
        UsageError: an address of another form, or one without a file where the repository has several.
        MissingError: no such repository or file, or it is not cached and the hub cannot be reached. `key` names the
            setting.
    """
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    match = ADDRESS.fullmatch(address)
    if not match:
        raise UsageError(f"{key}={address}: write hub:owner/name or hub:owner/name:file")
    repo, revision, name = match["repo"], match["revision"], match["file"]
    for part in (repo, revision, name):
        if part is not None and (part.startswith("/") or ".." in re.split(r"[/\\]", part)):
            raise UsageError(f"{key}={address}: {part} leads out of the repository")
    remedy = f"give a local copy: {key}=FILE"
    try:
        return _online(repo, revision, name, monitor, f"{key}={address}")
    except UsageError:
        raise
    except HFValidationError as error:
        raise UsageError(f"{key}={address}: {_first_line(error)}") from None
    except LocalEntryNotFoundError as error:
        reason: Exception = error
    except (EntryNotFoundError, HfHubHTTPError) as error:
        raise MissingError(f"{key}={address} was looked for on the hub: {_first_line(error)}; {remedy}") from None
    except Exception as error:  # whatever the transport raises without a network
        reason = error
    if name is None:
        raise MissingError(
            f"{key}={address}: the hub cannot be reached ({type(reason).__name__}) to list its files; {remedy}"
        )
    return (
        _cached(
            repo, revision, name, f"{key}={address}", f"the hub cannot be reached ({type(reason).__name__}); {remedy}"
        ),
        address,
    )


def _online(repo: str, revision: str | None, name: str | None, monitor: Monitor, setting: str) -> tuple[Path, str]:
    from huggingface_hub import HfApi, hf_hub_download

    info = HfApi().dataset_info(repo, revision=revision, timeout=TIMEOUT)
    name = name or _only_file([sibling.rfilename for sibling in info.siblings or ()], setting)
    license = getattr(info.card_data, "license", None) or "not stated by its card"
    monitor.note(f"Reading {name} of the hub's dataset {repo} (license: {license})")
    file = hf_hub_download(repo, name, repo_type="dataset", revision=info.sha, etag_timeout=TIMEOUT)
    return Path(file), f"hub:{repo}@{info.sha}:{name}"


def _cached(repo: str, revision: str | None, name: str, setting: str, otherwise: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(repo, name, repo_type="dataset", revision=revision, local_files_only=True))
    except EntryNotFoundError:
        raise MissingError(f"{setting} is not in the hub's cache and {otherwise}") from None


def _only_file(names: list[str], setting: str) -> str:
    usable = sorted(name for name in names if name.lower().endswith(FORMATS))
    if len(usable) != 1:
        found = ", ".join(usable[:5]) + (", …" if len(usable) > 5 else "")
        raise UsageError(
            f"{setting} has {len(usable)} data files ({found or 'none of ' + ', '.join(FORMATS)}); name one:"
            f" {setting}:FILE"
        )
    return usable[0]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
