"""The tiers this machine can run, each with a small pool."""

import pytest

from greenroom import native


@pytest.fixture(scope="session", params=native.usable_tiers())
def lib(request):
    return native.module(request.param)


@pytest.fixture(scope="session")
def pool(lib):
    return lib.Pool(2)
