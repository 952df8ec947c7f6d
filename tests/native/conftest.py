"""The tiers this machine can run, each with a small pool; AMX's tiles are for test_amx.py."""

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
