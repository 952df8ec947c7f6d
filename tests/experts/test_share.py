"""What the CPU takes of a long step: the experts with the fewest tokens, as rates allow."""

import pytest

from greenroom.experts.share import FEW, FEWEST, Rates, Share
from greenroom.experts.slabs import SlabLayout
from greenroom.gguf import GGMLType

LAYOUT = SlabLayout.plan((GGMLType.MXFP4,) * 3, 2880, 2880, biases=True)
WEIGHTS = 3 * 2880 * 2880
EXPERTS = list(range(32))


def lent(
    sizes: list[int], rates: Rates, waiting: list[int] = EXPERTS, part: float = 0.8
) -> list[int]:
    return Share(rates, part, 0, 0, 0).lend(waiting, 32, sizes, LAYOUT.nbytes, WEIGHTS)


def test_nothing_is_lent_to_a_slow_cpu_and_most_to_a_fast_one() -> None:
    assert lent([64] * 32, Rates(50e9, 1e9, 1e9)) == []
    assert len(lent([64] * 32, Rates(50e9, 1e15, 1e18))) == 31


@pytest.mark.parametrize(("tokens", "least", "most"), [(64, 7, 9), (256, 2, 2), (1024, 0, 0)])
def test_the_cpu_is_done_when_the_copies_are(tokens: int, least: int, most: int) -> None:
    """0.19 ms for weights and at 5 TOP/s 0.48 for 48 more tokens, beside 0.27 ms of copies."""
    rates = Rates(50e9, 70e9, 5e12)
    found = lent([tokens] * 32, rates)
    assert least <= len(found) <= most
    each = LAYOUT.nbytes / rates.reading + 6 * (tokens - FEW) * 2880 * 2880 / rates.operations
    busy = len(found) * each
    copying = (32 - len(found)) * LAYOUT.nbytes / rates.bus
    assert busy <= 0.8 * copying


def test_few_tokens_cost_as_much_as_their_weights_and_more_of_them_more() -> None:
    slow, fast = (len(lent([1] * 32, Rates(50e9, r, 5e12))) for r in (25e9, 100e9))
    assert 0 < slow < fast
    rates = Rates(50e9, 70e9, 5e12)
    one, few, more = (rates.computing(n, LAYOUT.nbytes, WEIGHTS) for n in (1, FEW, FEW + 1))
    assert one == few == LAYOUT.nbytes / 70e9
    assert more - few == pytest.approx(2 * WEIGHTS / 5e12)


def test_between_the_fewest_tokens_and_few_the_cost_grows_evenly() -> None:
    rates = Rates(50e9, 30e9, 5e12, reading_fewest=90e9)
    between = (FEWEST + FEW) / 2
    cost = [rates.computing(n, LAYOUT.nbytes, WEIGHTS) for n in (0.5, FEWEST, between, FEW)]
    least, few = LAYOUT.nbytes / 90e9, LAYOUT.nbytes / 30e9
    assert cost == pytest.approx([least, least, (least + few) / 2, few])
    assert cost[-1] == few  # exactly, however far apart they are
    assert len(lent([3] * 32, rates)) > len(lent([3] * 32, Rates(50e9, 30e9, 5e12)))
    slower = Rates(50e9, 30e9, 5e12, reading_fewest=20e9)  # a disturbed measurement
    assert slower.computing(1, LAYOUT.nbytes, WEIGHTS) == few


def test_those_with_the_fewest_tokens_go_first_and_only_those_that_wait() -> None:
    sizes = [100 - e for e in EXPERTS]
    found = lent(sizes, Rates(50e9, 70e9, 3e12), waiting=EXPERTS[:20])
    assert found
    assert found == EXPERTS[20 - len(found) : 20]


def test_a_larger_part_of_the_time_lends_more() -> None:
    counts = [len(lent([64] * 32, Rates(50e9, 70e9, 3e12), part=p)) for p in (0, 0.4, 0.8, 1.6)]
    assert counts == sorted(counts)
    assert counts[0] == 0 < counts[1] < counts[-1]


def test_meeting_must_pay() -> None:
    """0.67 ms an expert; 0.8 of 32 copies are 6.8 ms."""
    rates = Rates(50e9, 70e9, 5e12)
    layer = EXPERTS, 32, [64] * 32, LAYOUT.nbytes, WEIGHTS
    found = [len(Share(rates, 0.8, m, 0, 0).lend(*layer)) for m in (0, 3e-3, 7e-3)]
    of_routes = [len(Share(rates, 0.8, 0, m / 2048, 0).lend(*layer)) for m in (0, 3e-3, 7e-3)]
    assert found == of_routes == [7, 4, 0]


@pytest.mark.parametrize(("lent", "ahead"), [(0, 32), (1, 30), (8, 16), (12, 8), (28, 4), (32, 0)])
def test_ahead_leaves_the_cpu_a_choice(lent: int, ahead: int) -> None:
    assert Share.ahead(32, lent) == ahead


def test_the_bus_is_idle_while_routes_are_waited_for() -> None:
    rates = Rates(50e9, 70e9, 5e12)
    assert Share(rates, meeting=1e-3, route=0).idle(2048, 10_000_000) == 5
    assert Share(rates, meeting=1e-3, route=1e-6).idle(2048, 10_000_000) == 15
    assert Share(None).idle(2048, 10_000_000) == 0


@pytest.mark.parametrize("lent", [3, 5, 40])
def test_of_fewer_than_are_lent_none_set_off(lent: int) -> None:
    """As where the layer before has fewer experts in slots."""
    assert Share.ahead(3, lent) == 0


def test_few_are_not_worth_it_and_nothing_is_lent_unmeasured() -> None:
    rates = Rates(50e9, 70e9, 5e12)
    layer = EXPERTS, 32, [64] * 32, LAYOUT.nbytes, WEIGHTS
    found = [len(Share(rates, 0.8, 0, 0, least).lend(*layer)) for least in (0, 7 / 32, 8 / 32)]
    assert found == [7, 7, 0]
    assert Share(None).lend(*layer) == []
