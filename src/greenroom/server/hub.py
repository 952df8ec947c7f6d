"""Downloads GGUF files from Hugging Face (or where HF_ENDPOINT points) into its cache, and
removes downloaded ones. An interrupted download goes on where it stopped.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from greenroom.errors import GreenroomError, ModelFileError, RequestError
from greenroom.server.source import ModelSource
from greenroom.server.stores import parts, quantization

_REFERENCE = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*?)(?::(?P<quant>[\w.-]+))?")
_SPLIT_PART = re.compile(r"-(\d{5})-of-(\d{5})$")
# Tried in this order when the user names none: small and good first.
PREFERRED = ("MXFP4", "MXFP4_MOE", "Q4_K_M", "Q4_K_S", "Q4_0", "Q5_K_M", "Q8_0", "BF16", "F16")


@dataclass(frozen=True, slots=True)
class RemoteModel:
    """One model of a repository: its files in order, and their sizes in bytes."""

    repo: str
    quant: str
    files: tuple[str, ...]
    size: int


class HubError(GreenroomError):
    """The hub cannot be reached, or does not have what was asked for."""


def parse_reference(reference: str) -> tuple[str, str | None]:
    """`owner/repo[:quant]` in parts.

    Raises:
        RequestError: it is not of that form.
    """
    found = _REFERENCE.fullmatch(reference.removeprefix("hf.co/"))
    if not found:
        raise RequestError(f"{reference!r} is not of the form owner/repo or owner/repo:quant")
    return found["repo"], found["quant"]


def remote_models(repo: str, files: Sequence[tuple[str, int]]) -> list[RemoteModel]:
    """The models among a repository's files: split sets put together, projectors left out."""
    sets: dict[str, list[tuple[str, int]]] = {}
    for name, size in sorted(files):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name:
            continue  # a hostile repository's
        if path.suffix.lower() != ".gguf" or "mmproj" in path.name.lower():
            continue
        stem = _SPLIT_PART.sub("", path.stem)
        sets.setdefault(str(path.with_name(stem)), []).append((name, size))
    return [
        RemoteModel(
            repo,
            quantization(Path(f"{key}.gguf")),
            tuple(name for name, _ in members),
            sum(size for _, size in members),
        )
        for key, members in sets.items()
    ]


def choose(models: Sequence[RemoteModel], quant: str | None) -> RemoteModel:
    """The model with a quantisation; without one, the first of `PREFERRED` there is.

    Raises:
        HubError: there is none; the message says which there are.
    """
    if not models:
        raise HubError("this repository has no GGUF files; look for one whose name ends in GGUF")
    there = ", ".join(sorted({model.quant or model.files[0] for model in models}))
    if quant is not None:
        fitting = [m for m in models if quant.upper() in (m.quant, m.quant.removeprefix("UD-"))]
        if not fitting:
            raise HubError(f"{models[0].repo} has no {quant}; there is {there}")
        return fitting[0]
    if len(models) == 1:
        return models[0]
    for preferred in PREFERRED:
        for model in models:
            if model.quant == preferred:
                return model
    raise HubError(f"{models[0].repo} has several models; name one after a colon: {there}")


def web_errors() -> tuple[type[Exception], ...]:
    """What the hub's package raises when the network fails; its HTTP client has changed names."""
    from huggingface_hub import errors

    client: Any = vars(errors)["HTTPError"]
    return (client, errors.HfHubHTTPError, OSError)


def pull(reference: str, tell: Callable[[str], None]) -> Path:
    """Downloads a model; its first file's path.

    Args:
        reference: `owner/repo[:quant]`.
        tell: takes one line about what is being downloaded.

    Raises:
        HubError, RequestError: it cannot be had.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    repo, quant = parse_reference(reference)
    try:
        info = HfApi().model_info(repo, files_metadata=True)
        listed = [(file.rfilename, file.size or 0) for file in info.siblings or ()]
        model = choose(remote_models(repo, listed), quant)
        tell(f"{repo}:{model.quant or '-'}  {model.size / 2**30:.2f} GiB")
        paths = [
            hf_hub_download(repo, file, revision=info.sha, tqdm_class=None) for file in model.files
        ]
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        hint = "; a gated model needs HF_TOKEN" if status in (401, 403) else ""
        raise HubError(f"{repo}: the hub answered {status}{hint}") from None
    except web_errors() as error:
        raise HubError(f"{repo}: the download failed: {error}; run it again to go on") from None
    return Path(paths[0])


def remove(source: ModelSource) -> int:
    """Deletes a model's files; bytes freed.

    Raises:
        ModelFileError: it belongs to a store that must delete it itself.
    """
    assert source.path is not None
    if source.origin == "ollama":
        raise ModelFileError(f"{source.name} belongs to Ollama; use 'ollama rm {source.name}'")
    freed = 0
    for file in parts(source.path):
        blob = _own_blob(file)
        if blob is None:
            freed += 0 if file.is_symlink() else file.stat().st_size
            file.unlink()
            continue
        size = blob.stat().st_size
        file.unlink()
        if not _still_linked(file, blob):
            blob.unlink()
            freed += size
    return freed


def _own_blob(file: Path) -> Path | None:
    """The file of the hub's cache that a link in it stands for. Where other links lead is
    somebody else's, and stays."""
    repo = next((p.parent for p in file.parents if p.name == "snapshots"), None)
    if repo is None or not file.is_symlink():
        return None
    blob = file.resolve()
    return blob if blob.parent == (repo / "blobs").resolve() and blob.is_file() else None


def _still_linked(file: Path, blob: Path) -> bool:
    """Whether another revision of the hub's cache still shows this blob."""
    snapshots = next(p for p in file.parents if p.name == "snapshots")
    return any(path.is_symlink() and path.resolve() == blob for path in snapshots.rglob("*.gguf"))
