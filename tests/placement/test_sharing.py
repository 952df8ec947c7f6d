"""Rates for long steps, from a machine's profile."""

import pytest

from greenroom.experts.limits import rounded
from greenroom.placement.calibrate import MachineProfile
from greenroom.placement.sharing import measured_rates

FACTS = {"fingerprint": "x", "name": "a machine", "date": "today", "threads": 16, "ram": 1 << 37}
SPEEDS = {"MXFP4": 4000.0, "Q4_K": 2000.0}


def profile(**rates) -> MachineProfile:
    known = {"dram": {1: 12.0, 16: 120.0}, "pcie_up": {1: 20.0, 64: 52.0}, "experts_batch": SPEEDS}
    return MachineProfile(**FACTS, **(known | rates))


def test_rates_are_those_measured_within_a_tenth() -> None:
    found = measured_rates(profile(), {"MXFP4": 100}, 16)
    assert found.bus == pytest.approx(52e9, rel=0.1)
    assert found.reading == pytest.approx(68e9, rel=0.1)  # what the copies leave
    assert found.operations == pytest.approx(4e12, rel=0.1)


def test_formats_count_by_their_bytes_and_threads_by_their_number() -> None:
    found = measured_rates(profile(), {"MXFP4": 100, "Q4_K": 100}, 8)
    assert found.operations == pytest.approx(4 / 3 * 1e12, rel=0.1)
    assert found.bus == measured_rates(profile(), {"MXFP4": 1}, 16).bus
    slow = measured_rates(profile(dram={16: 50.0}), {"MXFP4": 1}, 16)
    assert slow.reading == pytest.approx(12.5e9, rel=0.1)


def test_noise_seldom_changes_a_rate_and_never_by_much() -> None:
    assert rounded(4000) == rounded(4100) == 4096
    assert rounded(1.1 * 4096) in (4096, 4096 * 2**0.25)


@pytest.mark.parametrize("lacking", [{"dram": {}}, {"pcie_up": {}}, {"experts_batch": {}}])
def test_without_a_rate_there_are_none(lacking: dict) -> None:
    assert measured_rates(profile(**lacking), {"MXFP4": 1}, 16) is None


def test_a_model_without_experts_shares_nothing() -> None:
    assert measured_rates(profile(), {}, 16) is None
