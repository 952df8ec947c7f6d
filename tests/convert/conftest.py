"""The dense model of the demo, fetched once into the user's cache."""

import lzma
from pathlib import Path

import pytest

from greenroom.convert.upcycle_demo import dense_model
from greenroom.errors import ModelFileError

TEXTS = Path(__file__).parents[2] / "../shared/data/text"


@pytest.fixture(scope="session")
def dense() -> Path:
    """SmolLM2-135M-Instruct, Q4_1."""
    try:
        return dense_model()
    except ModelFileError as error:
        if "could not be fetched" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Some thousand characters from the middle of each held-out text."""
    paths = sorted(TEXTS.glob("*.eval.txt.xz"))
    if not paths:
        pytest.skip(f"the held-out texts are not in {TEXTS}")
    found = []
    for path in paths:
        with lzma.open(path) as file:
            found.append(file.read(60_000)[-10_000:].decode(errors="ignore"))
    return found
