"""The tiers this machine can run, each with a small pool; AMX's tiles where they are asked for."""

import pytest

from greenroom import native

from .twins import tiles


@pytest.fixture(scope="session", params=native.usable_tiers())
def lib(request):
    module = native.module(request.param)
    with tiles(module, False):
        yield module


@pytest.fixture(scope="session")
def pool(lib):
    return lib.Pool(2)


@pytest.fixture(params=[t for t in ("avx512", "amx") if t in native.usable_tiers()])
def tiled(request):
    """A tier with tiles: its real instructions where they run, emulated ones in avx512."""
    module = native.module(request.param)
    with tiles(module, True):
        yield module
