"""Finds GGUF files on this machine: Hugging Face's cache, Ollama's and LM Studio's stores, and
folders that are named. Reads names and sizes only; a damaged file is found like any other.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from greenroom.errors import ModelFileError
from greenroom.server.source import ModelSource

_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})$")
_QUANT = re.compile(
    r"[-_.]((?:UD-)?(?:I?Q\d(?:_[A-Z0-9]+)*|MXFP4(?:_[A-Z]+)?|NVFP4|TQ\d_\d|BF16|F16|F32))$",
    re.IGNORECASE,
)
_ON_HUB = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?")
_MODEL_LAYER = "application/vnd.ollama.image.model"


def quantization(path: Path) -> str:
    """The quantisation a file's name ends with, such as `Q4_K_M`, or nothing."""
    found = _QUANT.search(_SPLIT.sub("", path.stem))
    return found[1].upper() if found else ""


def parts(path: Path) -> list[Path]:
    """All files of a split set, or the file alone.

    Raises:
        ModelFileError: one is missing.
    """
    found = _SPLIT.search(path.stem)
    if not found:
        return [path]
    head, count = path.stem[: found.start()], int(found[2])
    files = [path.with_name(f"{head}-{n:05d}-of-{count:05d}.gguf") for n in range(1, count + 1)]
    for file in files:
        if not file.exists():
            raise ModelFileError(f"{file.name}: missing from the split set of {count} files")
    return files


def _is_model(path: Path) -> bool:
    """A first file that begins as GGUF does and holds a language model."""
    split = _SPLIT.search(path.stem)
    if (split and split[1] != "00001") or "mmproj" in path.name.lower():
        return False
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def _source(name: str, path: Path, origin: str) -> ModelSource | None:
    try:
        sizes = [file.stat() for file in parts(path)]
    except (OSError, ModelFileError):
        return None
    total = sum(status.st_size for status in sizes)
    return ModelSource(name, path, total, sizes[0].st_mtime, origin)


def _files(folder: Path) -> Iterator[Path]:
    """Model files below a folder, in order of name."""
    for root, folders, files in os.walk(folder, followlinks=False):
        folders.sort()
        for file in sorted(files):
            path = Path(root, file)
            if path.suffix.lower() == ".gguf" and _is_model(path):
                yield path


def hub_cache() -> Path:
    """Hugging Face's cache, where its variables say or where it is by default."""
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache)
    home = os.environ.get("HF_HOME") or Path(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "huggingface"
    )
    return Path(home, "hub")


def _from_hub(cache: Path) -> Iterator[ModelSource | None]:
    for snapshot in sorted(cache.glob("models--*/snapshots/*")):
        repo = snapshot.parent.parent.name.removeprefix("models--").replace("--", "/")
        for path in _files(snapshot):
            quant = quantization(path)
            name = f"{repo}:{quant}" if quant else f"{repo}/{path.stem}"
            yield _source(name, path, "huggingface")


def _from_ollama(store: Path) -> Iterator[ModelSource | None]:
    manifests = store / "manifests"
    for manifest in sorted(path for path in manifests.glob("*/*/*/*") if path.is_file()):
        host, owner, model, tag = manifest.relative_to(manifests).parts
        try:
            layers = json.loads(manifest.read_text())["layers"]
            digest = next(x["digest"] for x in layers if x["mediaType"] == _MODEL_LAYER)
        except (OSError, ValueError, LookupError, TypeError, StopIteration):
            continue
        path = store / "blobs" / str(digest).replace(":", "-").replace("/", "-")
        if _is_model(path):
            shown = model if owner == "library" else f"{owner}/{model}"
            shown = shown if host == "registry.ollama.ai" else f"{host}/{shown}"
            yield _source(f"{shown}:{tag}", path, "ollama")


def _from_folder(folder: Path, origin: str) -> Iterator[ModelSource | None]:
    for path in _files(folder):
        yield _source(_SPLIT.sub("", path.stem), path, origin)


def _ollama_stores() -> list[Path]:
    if folder := os.environ.get("OLLAMA_MODELS"):
        return [Path(folder)]
    return [Path.home() / ".ollama/models", Path("/usr/share/ollama/.ollama/models")]


def discover(folders: Iterable[Path] = ()) -> list[ModelSource]:
    """All models of the known stores and the folders given; names are made unique."""
    found: list[ModelSource | None] = []
    for folder in folders:
        found += _from_folder(folder, "folder")
    found += _from_hub(hub_cache())
    for store in _ollama_stores():
        with contextlib.suppress(PermissionError):  # another user's
            found += _from_ollama(store)
    for folder in (Path.home() / ".lmstudio/models", Path.home() / ".cache/lm-studio/models"):
        found += _from_folder(folder, "lmstudio")
    return _unique(source for source in found if source is not None)


def _unique(sources: Iterable[ModelSource]) -> list[ModelSource]:
    """Each file once; a second model of a name gets its folder's name before its own."""
    names: dict[str, ModelSource] = {}
    seen: set[Path] = set()
    for source in sources:
        assert source.path is not None
        real = source.path.resolve()
        if real in seen:
            continue
        seen.add(real)
        name, folder, number = source.name, source.path.parent, 2
        if name in names:
            name = f"{folder.name}/{name}"
        while name in names:
            name, number = f"{folder.name}/{source.name}-{number}", number + 1
        renamed = ModelSource(name, source.path, source.size, source.modified, source.origin)
        names[name] = renamed
    return list(names.values())


def select(wanted: Iterable[str], folders: Iterable[Path] = ()) -> list[ModelSource]:
    """The models a command line names: files, folders, or names of found models; all that
    are found if it names none.

    Raises:
        ModelFileError: one of them does not exist.
    """
    wanted = list(wanted)
    if not wanted:
        return discover(folders)
    chosen: list[ModelSource] = []
    for spec in wanted:
        path = Path(spec).expanduser()
        if path.is_dir():
            chosen += _unique(s for s in _from_folder(path, "folder") if s is not None)
        elif path.is_file():
            source = _source(_SPLIT.sub("", path.stem), path, "given")
            assert source is not None or parts(path)
            chosen += [source] if source else []
        else:
            chosen.append(find(spec, folders))
    return _unique(chosen)


def find(name: str, folders: Iterable[Path] = ()) -> ModelSource:
    """The found model of a name; the beginning of one name is enough.

    Raises:
        ModelFileError: none or several fit.
    """
    sources = discover(folders)
    exact = [source for source in sources if source.name.lower() == name.lower()]
    fitting = exact or [s for s in sources if s.name.lower().startswith(name.lower())]
    if len(fitting) == 1:
        return fitting[0]
    if not fitting:
        wanted = name if _ON_HUB.fullmatch(name) else "owner/repo"
        raise ModelFileError(
            f"{name}: no such file or model; see 'greenroom list', or 'greenroom pull {wanted}'"
        )
    names = ", ".join(source.name for source in fitting[:10])
    raise ModelFileError(f"{name}: several models fit: {names}; name one")
