"""Chooses and imports the native extension: one build per instruction-set tier.

The portable build is imported first and says which tiers this processor and operating
system can run; the best of those that are installed is used. `GREENROOM_TIER` forces one.
Knows nothing of what the extensions compute.
"""

import importlib
import importlib.util
import os
from functools import cache
from types import ModuleType

from greenroom.errors import NativeError

TIERS = ("portable", "avx2", "avxvnni", "avx512", "amx")  # from the plainest to the fastest


@cache
def module(tier: str) -> ModuleType:
    """The extension of one tier; raises NativeError if it is not installed."""
    try:
        return importlib.import_module(f"greenroom._native_{tier}")
    except ImportError as error:
        raise NativeError(
            f"native extension for tier {tier!r} is not installed ({error}); reinstall greenroom"
        ) from None


@cache
def usable_tiers() -> tuple[str, ...]:
    """The tiers that are installed and that this machine can run, plainest first."""
    runnable = set(module("portable").runnable_tiers())
    found = []
    for tier in TIERS:
        if tier in runnable and importlib.util.find_spec(f"greenroom._native_{tier}"):
            found.append(tier)
    return tuple(found)


@cache
def lib() -> ModuleType:
    """The extension in use: the best usable tier, or the one `GREENROOM_TIER` names."""
    asked = os.environ.get("GREENROOM_TIER")
    if asked is None:
        return module(usable_tiers()[-1])
    if asked not in usable_tiers():
        raise NativeError(
            f"GREENROOM_TIER={asked} cannot run here; usable: {', '.join(usable_tiers())}"
        )
    return module(asked)
