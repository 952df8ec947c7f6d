"""What several tests of experts compute with."""

from typing import Any

import pytest

from greenroom import native

from .small_banks import LAYERS, CpuExperts, bank


@pytest.fixture(scope="module")
def pool() -> Any:
    """Two native threads."""
    return native.lib().Pool(2)


@pytest.fixture(scope="module")
def banks(pool: Any) -> list[CpuExperts]:
    """The experts of some layers."""
    return [bank(pool, seed) for seed in range(LAYERS)]
