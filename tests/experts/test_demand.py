"""Which experts set off before a long step's routes are known."""

import pytest

from greenroom.experts.demand import Demand

EXPERTS = 8
MANY = 64  # routes


def counted(*steps: dict[int, int]) -> Demand:
    demand = Demand(EXPERTS)
    for step in steps:
        demand.count([step.get(e, 0) for e in range(EXPERTS)])
    return demand


def test_at_first_all_experts_are_likely_in_a_step_of_many_routes() -> None:
    assert counted().likely(range(EXPERTS), MANY) == [*range(EXPERTS)]
    assert counted().expected(range(EXPERTS)) == EXPERTS


@pytest.mark.parametrize(("routes", "found"), [(18, 0), (19, EXPERTS)])  # 1 - e^(-routes / 8) > 0.9
def test_few_routes_may_meet_any_expert(routes: int, found: int) -> None:
    assert len(counted().likely(range(EXPERTS), routes)) == found


def test_those_with_the_most_routes_come_first_and_only_those_asked_for() -> None:
    demand = counted({0: 10, 1: 30, 2: 20, 3: 10, 4: 10, 5: 10, 6: 10, 7: 10})
    assert demand.likely([0, 1, 2, 7], MANY) == [1, 2, 0, 7]


def test_who_was_not_wanted_waits_until_it_was_wanted_often() -> None:
    without = {e: 20 for e in range(EXPERTS) if e != 3}
    assert 3 not in counted(without).likely(range(EXPERTS), MANY)
    assert counted(without).expected([3]) == 1
    assert counted(*[without] * 5).expected(range(EXPERTS)) == EXPERTS - 1
    again = dict.fromkeys(range(EXPERTS), 20)
    assert 3 not in counted(without, *[again] * 3).likely(range(EXPERTS), MANY)
    assert 3 in counted(without, *[again] * 4).likely(range(EXPERTS), MANY)


def test_a_step_of_few_routes_tells_nothing() -> None:
    assert counted({0: 5}, {}).likely(range(EXPERTS), MANY) == [*range(EXPERTS)]


def test_who_is_wanted_every_other_time_may_come_while_the_bus_is_idle() -> None:
    all_of_them = dict.fromkeys(range(EXPERTS), 20)
    without, lacking = ({e: 20 for e in all_of_them if e not in gone} for gone in ({3}, {3, 5}))
    demand = counted(without, lacking)
    assert demand.perhaps(range(EXPERTS), MANY) == [5, 3]
    assert demand.perhaps([3, 4], MANY) == [3]
    assert not set(demand.likely(range(EXPERTS), MANY)) & {3, 5}
    assert demand.perhaps(range(EXPERTS), 8) == []
    assert counted(*[without] * 5).perhaps(range(EXPERTS), MANY) == []
