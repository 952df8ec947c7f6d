"""Whether experts in VRAM pay, judged by what steps take: what a miss costs more than a hit, what a
copy under way costs a step, and what stepping without a part would take. Promotions are held
against what would have been hit without them, as texts change what is hit with them.

Learns from times it is told and answers with what to do next. Knows no clock and no device.
"""

import logging
from collections import deque
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

WINDOW = 512  # steps between judgements
GAIN = 0.01  # promotions must raise the hit rate by so much, else they are of no use
PAUSE = 16  # windows without a part that did not pay; then it has another chance
MOVES = 4  # promotions at once, at most
DEAR = 0.1  # of a step: copies that slow it by more become fewer
LASTING = 8  # windows for which a promotion is taken to be of use
TRIAL = 64  # steps without the slots, to be compared with as many before
BETTER = 0.98  # they must take less than so much of the time

_MEMORY = 1 - 1 / WINDOW  # weight of the past, per step
_DRIFT = 1 / 32  # slower changes than over so many steps, as contexts grow, are not looked at
_ODD = 3.0  # times the usual: a step somebody else slowed down
_SURE = 4.0  # standard errors

log = logging.getLogger(__name__)


class Cost(NamedTuple):
    """Seconds, and the standard error of that."""

    seconds: float
    error: float

    @property
    def positive(self) -> bool:
        """Whether it costs something, surely."""
        return self.seconds > _SURE * self.error

    @property
    def negative(self) -> bool:
        """Whether it saves something, surely."""
        return self.seconds < -_SURE * self.error


UNKNOWN = Cost(0.0, float("inf"))


class StepCosts:
    """Least squares: what a miss (instead of a hit) and a copy under way add to a step's time."""

    def __init__(self) -> None:
        self._mean: NDArray[np.float64] | None = None  # seconds, misses, copying
        self._products = np.zeros((3, 3))  # of deviations from the mean
        self._weight, self._odd = 0.0, 0

    def add(self, seconds: float, misses: int, copying: bool) -> None:
        """Takes a step of the usual size."""
        now = np.array([seconds, misses, copying], np.float64)
        if self._mean is None or self._odd >= 16:  # times are others from here on
            self._mean, self._odd = now, 0
            self._products[:], self._weight = 0, 0.0
            return
        if seconds > _ODD * self._mean[0]:
            self._odd += 1
            return
        self._odd = 0
        deviation = now - self._mean
        self._mean = self._mean + _DRIFT * deviation
        self._products = _MEMORY * self._products + np.outer(deviation, deviation)
        self._weight = _MEMORY * self._weight + 1

    @property
    def seconds(self) -> float:
        """Of a step, lately."""
        return 0.0 if self._mean is None else float(self._mean[0])

    def costs(self) -> tuple[Cost, Cost]:
        """Of a miss, and of copies being under way; unknown where steps did not differ in it."""
        found = [UNKNOWN, UNKNOWN]
        varied = [i for i in (1, 2) if self._products[i, i] > 1e-9]
        if self._weight < 2 * TRIAL or not varied:
            return found[0], found[1]
        inverse = np.linalg.pinv(self._products[np.ix_(varied, varied)])
        slopes = inverse @ self._products[varied, 0]
        left = max(0.0, float(self._products[0, 0] - slopes @ self._products[varied, 0]))
        variance = left / (self._weight - len(varied) - 1)
        for i, slope, square in zip(varied, slopes, np.diag(inverse), strict=True):
            found[i - 1] = Cost(float(slope), float(np.sqrt(variance * square)))
        return found[0], found[1]


class SelfCheck:
    """Decides, window by window, which parts stay on.

    Args:
        layers: of the model; fewer promotions than that for a window say nothing.

    Attributes:
        using: whether slots are to be used.
        moves: promotions at once, 0 while they are paused.
    """

    def __init__(self, layers: int) -> None:
        self.using, self.moves = True, MOVES
        self._layers, self._costs, self._tokens = layers, StepCosts(), 0
        self._last: deque[float] = deque(maxlen=TRIAL)
        self._before: float | None = None  # seconds of a step with slots, while without on trial
        self._steps = self._paused = self._resting = 0
        self._hits = self._misses = self._stayed = self._promoted = self._copying = 0
        self._lasted = 0.0  # windows, of all promotions together
        self._said: set[str] = set()

    def step(
        self, tokens: int, seconds: float, hits: int, misses: int, stayed: int, copying: bool
    ) -> None:
        """Takes a short step.

        Args:
            tokens: of it.
            seconds: 0 where its time is not known.
            hits, misses: its routes.
            stayed: hits had nobody been promoted since the window began.
            copying: whether promotions were under way beside it.
        """
        self._steps += 1
        self._hits, self._misses = self._hits + hits, self._misses + misses
        self._stayed, self._copying = self._stayed + stayed, self._copying + copying
        if seconds > 0:
            self._time(tokens, seconds, misses, copying)
        if self._before is not None and len(self._last) == TRIAL:
            self._conclude()
        if self.begins:
            self._judge()

    @property
    def begins(self) -> bool:
        """Whether the next step is the first of a window."""
        return self._steps % WINDOW == 0

    def promoted(self, count: int) -> None:
        """Takes note of promotions."""
        self._promoted += count
        self._lasted += count * (1 - self._steps % WINDOW / WINDOW)

    def report(self) -> dict[str, Any]:
        """Seconds by which a miss and copies under way lengthen a step; None where unknown."""
        miss, copy = self._costs.costs()
        figures = {"miss": miss, "copying": copy}
        known = {k: c.seconds if c.error < abs(c.seconds) else None for k, c in figures.items()}
        return known | {"using": self.using, "moves": self.moves}

    def _time(self, tokens: int, seconds: float, misses: int, copying: bool) -> None:
        if tokens != self._tokens:  # of another size: nothing to compare with
            self._tokens, self._costs = tokens, StepCosts()
            self._last.clear()
            if self._before is not None:
                self.using, self._before = True, None
        self._last.append(seconds)
        if self.using:
            self._costs.add(seconds, misses, copying)

    def _judge(self) -> None:
        if not self.using and self._before is None:
            self._resting -= 1
            self.using = self._resting <= 0
        elif self._before is None:
            self._judge_promotions()
            miss, _ = self._costs.costs()
            if miss.negative and self._hits and len(self._last) == TRIAL:
                self._before, self.using = median(self._last), False
                self._last.clear()
        self._hits = self._misses = self._stayed = self._promoted = self._copying = 0
        self._lasted = 0.0

    def _judge_promotions(self) -> None:
        miss, copy = self._costs.costs()
        if self._paused:
            self._paused -= 1
            self.moves = 0 if self._paused else MOVES
            return
        routes = max(1, self._hits + self._misses)
        late = self._promoted / max(self._lasted, 1.0)  # who came late had less time to be hit
        gained = (self._hits - self._stayed) * late
        saved, spent = gained * miss.seconds * LASTING, copy.seconds * self._copying
        useless = self._lasted > self._layers and gained < GAIN * routes
        if useless or (copy.positive and miss.positive and spent > max(0.0, saved)):
            self._paused, self.moves = PAUSE, 0
            before, after = 100 * self._stayed / routes, 100 * self._hits / routes
            self._say(f"promotions are paused: {self._promoted} of them took the hit rate from "
                      f"{before:.1f} to {after:.1f} %")  # fmt: skip
        elif copy.positive and copy.seconds > DEAR * self._costs.seconds:
            self.moves = max(1, self.moves // 2)
        else:
            self.moves = min(MOVES, 2 * self.moves)

    def _conclude(self) -> None:
        """The trial is over: as many steps without the slots as there had been with them."""
        assert self._before is not None
        without, before = median(self._last), self._before
        self._before = None
        self.using = without > BETTER * before
        self._resting = PAUSE
        self._costs = StepCosts()  # what was learnt made for this trial: no other without new facts
        if not self.using:
            self._say(f"experts in VRAM are not used: a step takes {1e3 * without:.2f} ms without "
                      f"them and {1e3 * before:.2f} ms with them")  # fmt: skip

    def _say(self, text: str) -> None:
        kind = text.split(":")[0]
        if kind not in self._said:
            self._said.add(kind)
            log.info(text)
