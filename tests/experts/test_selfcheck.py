"""The self-check on machines made up for the purpose: times are computed, no clock is read."""

import logging
from dataclasses import dataclass, field

import numpy as np
import pytest

from greenroom.experts.selfcheck import MOVES, PAUSE, TRIAL, WINDOW, SelfCheck, StepCosts

ROUTES = 96  # of a step: 24 layers, 4 experts each


@dataclass
class Machine:
    """Seconds of a step: so much in any case, for a hit, a miss, and while copies are under way."""

    base: float = 2e-3
    hit: float = 5e-6
    miss: float = 60e-6
    copying: float = 0.0
    noise: float = 20e-6
    hits: float = 0.5  # share of routes
    gain: float = 0.0  # by which a window with promotions raises it
    stayed: float = 0.5  # what it would be without those of this window
    drift: float = 0.0  # seconds by which a step is longer than the one before
    steps: int = 0
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(4))

    def step(self, check: SelfCheck, tokens: int = 1) -> None:
        self.steps += 1
        self.stayed = self.hits if check.begins else self.stayed
        hits = int(self.random.binomial(ROUTES, self.hits)) if check.using else 0
        stayed = int(self.random.binomial(ROUTES, self.stayed)) if check.using else 0
        copying = check.using and check.moves > 0 and self.steps % 4 == 0
        if copying:
            check.promoted(check.moves)
            self.hits = min(1.0, self.hits + self.gain / WINDOW * 4)
        seconds = self.seconds(hits, copying, check.moves)
        check.step(tokens, seconds, hits, ROUTES - hits, stayed, copying)

    def seconds(self, hits: int, copying: bool, moves: int = MOVES) -> float:
        exact = self.base + self.drift * self.steps + self.hit * hits + self.miss * (ROUTES - hits)
        exact += self.copying * moves / MOVES * copying
        return exact + abs(float(self.random.normal(0, self.noise)))

    def run(self, check: SelfCheck, windows: float) -> None:
        for _ in range(int(windows * WINDOW)):
            self.step(check)


@pytest.mark.parametrize("drift", [0.0, 2e-6])
def test_what_misses_and_copies_cost_is_learnt(drift: float) -> None:
    machine, check = Machine(copying=300e-6, drift=drift, gain=0.05), SelfCheck(24)
    machine.run(check, 0.9)
    found = check.report()
    assert found["miss"] == pytest.approx(machine.miss - machine.hit, rel=0.1)
    assert found["copying"] == pytest.approx(300e-6, rel=0.15)


def test_nothing_is_claimed_to_be_known_early_or_where_nothing_differs() -> None:
    costs = StepCosts()
    for _ in range(2 * TRIAL - 2):
        costs.add(1e-3, 40, False)
    assert not any(cost.positive or cost.negative for cost in costs.costs())
    machine, check = Machine(hits=1.0), SelfCheck(24)  # all experts have a slot
    machine.run(check, 3)
    assert check.report()["miss"] is None
    assert check.using


def test_a_step_that_somebody_else_slowed_down_teaches_nothing() -> None:
    machine, check = Machine(), SelfCheck(24)
    for index in range(WINDOW - 1):
        machine.step(check)
        if index % 50 == 49:
            check.step(1, 1.0, ROUTES, 0, ROUTES, True)
    assert check.report()["miss"] == pytest.approx(55e-6, rel=0.1)


def test_slots_that_pay_stay_in_use() -> None:
    machine, check = Machine(gain=0.05), SelfCheck(24)
    machine.run(check, 6)
    assert check.using
    assert check.moves == MOVES


def test_slots_slower_than_the_cpu_are_left_out_and_tried_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A weak GPU beside many cores; what is learnt is confirmed by steps without the slots."""
    machine, check = Machine(hit=80e-6, miss=20e-6, gain=0.02), SelfCheck(24)
    with caplog.at_level(logging.INFO, "greenroom.experts.selfcheck"):
        machine.run(check, 1.5)
        assert not check.using
        machine.run(check, PAUSE)
        assert check.using  # another chance
        machine.run(check, 2)
        assert not check.using
    said = [record.message for record in caplog.records if "not used" in record.message]
    assert len(said) == 1
    assert "without them" in said[0]


def test_slots_come_back_where_steps_without_them_are_no_faster() -> None:
    """Misses look cheap, step by step, but all of them at once are not."""

    class Crowded(Machine):
        def seconds(self, hits: int, copying: bool, moves: int = MOVES) -> float:
            return super().seconds(hits, copying, moves) + (20e-3 if hits == 0 else 0)

    machine, check = Crowded(hit=80e-6, miss=20e-6, gain=0.02), SelfCheck(24)
    machine.run(check, 1)
    assert not check.using  # on trial
    machine.run(check, (TRIAL + 1) / WINDOW)
    assert check.using


def test_a_trial_ends_where_steps_change_their_size() -> None:
    machine, check = Machine(hit=80e-6, miss=20e-6, gain=0.02), SelfCheck(24)
    machine.run(check, 1)
    assert not check.using
    machine.step(check, tokens=4)
    assert check.using


def test_promotions_that_bring_no_hits_pause(caplog: pytest.LogCaptureFixture) -> None:
    machine, check = Machine(), SelfCheck(24)
    with caplog.at_level(logging.INFO, "greenroom.experts.selfcheck"):
        machine.run(check, 1)
        assert check.moves == 0
        machine.run(check, PAUSE)
        assert check.moves == MOVES
        machine.run(check, 1)
        assert check.moves == 0
    assert [r.message.split(":")[0] for r in caplog.records] == ["promotions are paused"]


def test_promotions_that_keep_up_with_changing_texts_go_on() -> None:
    """In every window others are in demand than before: no window hits more than the last."""

    class Changing(Machine):
        def step(self, check: SelfCheck, tokens: int = 1) -> None:
            self.hits = 0.3 if check.begins else self.hits
            super().step(check, tokens)

    machine, check = Changing(gain=0.1), SelfCheck(24)
    for _ in range(8):
        machine.run(check, 1)
        assert check.moves == MOVES


@pytest.mark.parametrize(("gain", "moves"), [(0.02, MOVES), (0.005, 0)])
@pytest.mark.parametrize("begun", [0, 256, 448])
def test_promotions_are_judged_by_the_time_they_had(begun: int, gain: float, moves: int) -> None:
    check = SelfCheck(24)
    for index in range(WINDOW):
        if index == begun:
            check.promoted(400)
        hits = 10000 + round(gain * 20000) * (index >= begun)
        check.step(1, 0.0, hits, 20000 - hits, 10000, False)
    assert check.moves == moves


def test_a_few_promotions_at_the_end_of_a_window_say_nothing() -> None:
    check = SelfCheck(24)
    for index in range(WINDOW):
        if index == WINDOW - 100:
            check.promoted(100)
        check.step(1, 0.0, 48, 48, 48, False)
    assert check.moves == MOVES


def test_promotions_that_cost_more_than_they_bring_pause() -> None:
    """A slow bus that copies share with the step: hits grow, time grows more."""
    machine, check = Machine(copying=4e-3, gain=0.04, hits=0.2, miss=10e-6), SelfCheck(24)
    machine.run(check, 3)
    assert check.moves == 0


def test_copies_that_slow_a_step_become_fewer_and_more_again() -> None:
    machine, check = Machine(copying=1.5e-3, gain=0.1, hits=0.1), SelfCheck(24)
    machine.run(check, 2)
    assert check.moves == 1
    machine.copying = 0.0
    machine.run(check, 6)
    assert check.moves == MOVES
