"""Uploads a folder to the hub: what would go, then the files, each checked by its sum.

Files that are there already with the same sum are left out, so that an upload that broke off
goes on where it stopped. Knows nothing of models.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from greenroom.errors import GreenroomError, ModelFileError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

SUMS = "SHA256SUMS"
_BLOCK = 8 << 20


class PublishError(GreenroomError):
    """The hub refused, or could not be reached."""


@dataclass(frozen=True, slots=True)
class Upload:
    """One file: its name in the repository, size in bytes, sum, and whether it is there."""

    name: str
    size: int
    sha256: str
    present: bool


def sha256_of(path: Path) -> str:
    """The sum of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_BLOCK):
            digest.update(piece)
    return digest.hexdigest()


def local_files(folder: Path) -> list[Path]:
    """What would go: no hidden files, no checksum list; ModelFileError if there is nothing."""
    if not folder.is_dir():
        raise ModelFileError(f"{folder}: this is no folder; give the one to publish")
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name != SUMS
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not any(path.suffix == ".gguf" for path in found):
        raise ModelFileError(f"{folder}: there is no .gguf file to publish")
    return found


def plan(folder: Path, repository: str, api: "HfApi | None" = None) -> list[Upload]:
    """The files with their sums; with `api` also which of them are there already.

    Raises:
        PublishError: this is no name of a repository, or the hub could not be asked.
    """
    check_name(repository)
    there = remote_sums(repository, api) if api is not None else {}
    uploads = []
    for path in local_files(folder):
        name, sum = path.relative_to(folder).as_posix(), sha256_of(path)
        uploads.append(Upload(name, path.stat().st_size, sum, there.get(name) == sum))
    return uploads


def check_name(repository: str) -> None:
    """PublishError unless it is owner/name as the hub takes it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repository)
        valid = repository.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise PublishError(f"{repository!r} is no name of a repository; give owner/name")


def remote_sums(repository: str, api: "HfApi") -> dict[str, str]:
    """Sums of the large files of a repository; empty if there is no such repository."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(repository, files_metadata=True)
    except RepositoryNotFoundError:
        return {}
    except Exception as error:  # the client raises many kinds
        raise _refused(repository, error) from None
    return {item.rfilename: item.lfs.sha256 for item in info.siblings or [] if item.lfs}


def publish(
    folder: Path,
    repository: str,
    uploads: list[Upload],
    api: "HfApi",
    private: bool = False,
    done: Callable[[Upload], None] = lambda upload: None,
) -> None:
    """Makes the repository if need be and uploads what is not there, the checksums last.

    Raises:
        PublishError: the hub refused or could not be reached; run it again to go on.
    """
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        for upload in uploads:
            if not upload.present:
                _put(api, repository, upload.name, str(folder / upload.name))
            done(upload)
        _put(api, repository, SUMS, checksums(uploads).encode())
    except Exception as error:  # the client raises many kinds
        raise _refused(repository, error) from None


def _put(api: "HfApi", repository: str, name: str, content: str | bytes) -> None:
    api.upload_file(
        path_or_fileobj=content,
        path_in_repo=name,
        repo_id=repository,
        commit_message=f"Upload {name}",
    )


def checksums(uploads: list[Upload]) -> str:
    """The sums as `sha256sum --check` reads them."""
    return "".join(f"{upload.sha256}  {upload.name}\n" for upload in uploads)


def _refused(repository: str, error: Exception) -> PublishError:
    reason = " ".join(str(error).split())[:200]
    return PublishError(
        f"{repository}: the hub refused or could not be reached ({reason}); check the name and "
        "the token, then run the command again: it goes on where it stopped"
    )
