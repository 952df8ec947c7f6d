"""Loads tiny models for the tests; the file and the model of a case are made once."""

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from greenroom.gguf import GGUFFile
from greenroom.models import LoadOptions, Model, load_model

from .cases import CASES
from .hf_export import Tiny

Loader = Callable[..., tuple[Tiny, Model]]

logging.getLogger("transformers").setLevel(logging.ERROR)


@pytest.fixture(scope="session")
def load(tmp_path_factory: pytest.TempPathFactory) -> Loader:
    """`load(case, seed, type, **options)` -> the reference and the loaded model."""
    folder: Path = tmp_path_factory.mktemp("tiny")

    @cache
    def tiny(case: str, seed: int) -> Tiny:
        return CASES[case].make(seed)

    @cache
    def path(case: str, seed: int, type: str) -> Path:
        return tiny(case, seed).write(folder / f"{case}-{seed}-{type}.gguf", type)

    @cache
    def loaded(case: str, seed: int = 1, type: str = "F32", **options: Any) -> tuple[Tiny, Model]:
        options = {"backend": "reference", "threads": 2} | CASES[case].options | options
        with GGUFFile(path(case, seed, type)) as file:
            return tiny(case, seed), load_model(file, LoadOptions(**options))

    return loaded
