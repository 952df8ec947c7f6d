"""What the experts of one layer cost the CPU: calls, time and bytes read, of short steps (decoding)
and long ones (prompts) apart. Knows no layer and no rate; whoever computes reports to it.
"""

from dataclasses import dataclass, field

from greenroom.experts.limits import SHORT_STEP


@dataclass(slots=True)
class Spent:
    """Calls, seconds within them, bytes of the experts they read."""

    calls: int = 0
    seconds: float = 0.0
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class Meter:
    """Of one layer."""

    short: Spent = field(default_factory=Spent)
    long: Spent = field(default_factory=Spent)

    def add(self, tokens: int, seconds: float, nbytes: int) -> None:
        """Takes one call with so many tokens."""
        spent = self.short if tokens <= SHORT_STEP else self.long
        spent.calls += 1
        spent.seconds += seconds
        spent.nbytes += nbytes
