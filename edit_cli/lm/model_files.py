"""Where a model's files are: packaged, in a folder, on the hub or in its cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from edit_cli import assets
from edit_cli.errors import MissingError
from edit_cli.files import hub
from edit_cli.files.paths import expanded

EMBEDDED = "embedded:"
TIMEOUT = 5  # seconds that the hub may take to answer
REMEDY = "give a local folder instead: {key}=/path/to/folder (written by save_pretrained)"


def packaged(path: str) -> Path:
    """The file or folder that `embedded:<path>` names, inside the package's assets.

    Raises:
        MissingError: there is no such asset, or the path leaves the assets.
    """
    name = PurePosixPath(path.removeprefix(EMBEDDED))
    if name.is_absolute() or ".." in name.parts or not name.parts or not (assets.FOLDER / name).exists():
        raise MissingError(f"{EMBEDDED}{name} names nothing that comes with edit-cli")
    return assets.FOLDER / name


@dataclass(frozen=True)
class Source:
    """A folder to load from, or a hub id with its commit. local: only files that are here already are used."""

    path: str
    revision: str | None
    local: bool


def resolve(model_id: str, revision: str | None, key: str = "model.id") -> Source:
    """Where the files are. key: the setting that names them, for messages.

    Raises:
        MissingError: nowhere.
    """
    if model_id.startswith(EMBEDDED):
        return Source(str(packaged(model_id)), None, True)
    if hub.is_address(model_id):
        address = hub.Address.parse(model_id, f"{key}=")
        if address.folder:
            raise MissingError(f"{key}={model_id}: a model is a whole repository: give hub:{address.repo}")
        return _on_hub(address.repo, revision or address.revision, key)
    folder = expanded(model_id)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise MissingError(
                f"{key}={model_id} is a folder without config.json; give a folder that save_pretrained wrote"
            )
        return Source(str(folder), revision, True)
    if folder.is_absolute() or model_id.startswith((".", "~")) or model_id.count("/") > 1:
        raise MissingError(f"{key}={model_id}: no such folder")
    return _on_hub(model_id, revision, key)


def _on_hub(model_id: str, revision: str | None, key: str) -> Source:
    """The commit that the hub has, asked once and without retries, or the one in the hub's cache here.

    Raises:
        MissingError: neither.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError

    remedy = REMEDY.format(key=key)
    where = f"{key}={model_id} is no folder here"
    try:
        found = get_hf_file_metadata(hf_hub_url(model_id, "config.json", revision=revision), timeout=TIMEOUT)
        return Source(model_id, found.commit_hash or revision, False)
    except HFValidationError:
        raise MissingError(f"{where} and no valid hub id; {remedy}") from None
    except Exception as error:  # whatever the transport raises without a network
        reason = error
    cached = try_to_load_from_cache(model_id, "config.json", revision=revision)
    if isinstance(cached, str):
        return Source(model_id, Path(cached).parent.name, True)  # …/snapshots/COMMIT/config.json
    if isinstance(reason, GatedRepoError):
        raise MissingError(
            f"{key}={model_id} is gated: accept its license on the hub and log in with `hf auth login`, or {remedy}"
        )
    if isinstance(reason, HfHubHTTPError):
        raise MissingError(f"{where}, and the hub answers: {first_line(reason)}; {remedy}")
    raise MissingError(
        f"{where} and not in the hub's cache, and the hub cannot be reached ({type(reason).__name__}); {remedy}"
    )


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
