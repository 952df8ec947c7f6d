"""Seconds that the CPU takes for matrices and attention, from a machine's measured rates.

Kernels take tokens in tiles of 1, 4 and 16, on AVX-512 also of 2 and 8 (csrc/matmul/activations.h;
the widths AVX2 has besides are taken for these). The first tile reads the matrix from memory while
it computes; the others find it in the cache. Measures nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from greenroom.experts.quota import binomial
from greenroom.placement.calibrate import KEY_TILE, MachineProfile
from greenroom.placement.work import Work

WIDE, FOUR = 16, 4  # tokens of a tile
# Tokens that are worth a tile, by its width, and where there are also tiles of 2 and 8.
COARSE = {1: 1, FOUR: 2, WIDE: 13}
FINE = {1: 1, 2: 2, FOUR: 3, 8: 7, WIDE: 13}
# Operations for each number that the measured matrices of 2,048 columns give. Narrower ones give
# more numbers for the same operations.
DENSITY = 2 * 2048


def tiles(tokens: int, fine: bool = False) -> dict[int, int]:
    """How many tiles the kernels cut so many tokens into, by width, the widest first."""
    wide, left = divmod(tokens, WIDE)
    found = {WIDE: wide} if wide else {}
    while left > 0:
        width = max(w for w, least in (FINE if fine else COARSE).items() if left >= least)
        found[width] = found.get(width, 0) + 1
        left -= width
    return found


def _along(tokens: int, each: Mapping[int, float], further: float, reading: float) -> float:
    """Seconds of a matrix for so many tokens, from those of each tile by width, of a further wide
    one, and of reading it."""
    cut = tiles(tokens, 2 in each)
    whole = sum(each[width] * count for width, count in cut.items())
    whole += max(0, cut.get(WIDE, 0) - 1) * (further - each[WIDE])
    first = each[max(cut)]
    return whole - first + _together(first, reading)


def _together(computing: float, reading: float) -> float:
    """Seconds of both at once: as the longer where one is short, a quarter more where they are
    alike (four tokens, 25 November 2026, two Emerald Rapids cores: 8 to 30 % more than the
    longer)."""
    return float((computing**3 + reading**3) ** (1 / 3))


@dataclass(frozen=True, slots=True)
class CpuSeconds:
    """Of a model on a machine.

    Args:
        machine: its rates.
        work: the model.
        cache: bytes of keys and values that steps read besides.
    """

    machine: MachineProfile
    work: Work
    cache: float = 0.0

    def experts(self, tokens: int) -> float:
        """All experts in a step of so many tokens, routed uniformly."""
        work, machine = self.work, self.machine
        counts = binomial(tokens, work.share)
        more = work.expert_outputs * machine.expert_output_seconds
        seconds = tokens * work.share * more
        for name, size in work.experts.items():
            reading = self._reading(size, machine.rate(machine.experts, name))
            each = self._tile_seconds(name, work.expert_values[name])
            seconds += sum(likely * _along(n, *each, reading) for n, likely in counts.items())
        return seconds

    def dense(
        self, sizes: Mapping[str, int], tokens: int, values: Mapping[str, int], outputs: int = 0
    ) -> float:
        """Matrices of `sizes` bytes and `values` weights by format, with `outputs` rows in all."""
        machine = self.machine
        wide = 2 * sum(values.values()) / DENSITY
        seconds = tokens * max(0.0, outputs - wide) * machine.dense_output_seconds
        for name, size in sizes.items():
            reading = self._reading(size, machine.rate(machine.dense, name))
            seconds += _along(tokens, *self._tile_seconds(name, values[name]), reading)
        return seconds

    def between(self, tokens: int) -> float:
        """What stands between matrices: norms and the like, activations and sums of MLPs."""
        work, machine = self.work, self.machine
        passed = work.passed * machine.norm_seconds
        return tokens * (passed + work.mlp_outputs * machine.expert_output_seconds)

    def _reading(self, size: int, rate: float) -> float:
        return size / 1e9 / max(rate, 1e-3) / self._faster

    def _tile_seconds(self, name: str, values: float) -> tuple[dict[int, float], float]:
        """Of tiles by width, and of further wide ones, over so many weights in the cache. A profile
        without them has the rate of many tokens alone."""
        machine, size = self.machine, 2 * values
        many = size * WIDE / 1e9 / max(machine.expert_batch_rate(name), 1e-3)
        if not machine.tile_wide:
            return {1: 0.0, FOUR: many * FOUR / WIDE, WIDE: many}, many
        rates = {1: machine.tile_one, FOUR: machine.tile_four, WIDE: machine.tile_wide}
        if machine.tile_two and machine.tile_eight:
            rates |= {2: machine.tile_two, 8: machine.tile_eight}

        def seconds(width: int, rates: Mapping[str, float]) -> float:
            return size * width / 1e9 / max(machine.rate(rates, name), 1e-3)

        return {w: seconds(w, of) for w, of in rates.items()}, seconds(WIDE, machine.tile_further)

    @property
    def _faster(self) -> float:
        """How much faster than from RAM the model is read: a small one stays in the cache."""
        best = self.machine.dram_best
        return max(1.0, self.machine.read_rate(self.footprint) / best) if best else 1.0

    @property
    def footprint(self) -> float:
        """Bytes that steps read over and over."""
        return self.work.nbytes + self.cache

    def attention_step(self, tokens: int, context: int) -> float:
        """Attention of `tokens` sequences, one query over `context` keys each."""
        if not context:
            return 0.0
        pairs = tokens * self.work.pairs(context - 1, context)
        finding, reading = self.machine.key_seconds
        keys = self.work.kv_heads * finding + self.work.kv * reading / self._faster
        return pairs * (self._pair_seconds + keys)

    def attention_prompt(self, sequences: int, tokens: int) -> float:
        """Attention of whole prompts. At either end of what a query sees, on average half a tile
        of keys is scored in vain."""
        ends = sum(1 + (w is not None and w < tokens) for w in self.work.windows)
        pairs = self.work.pairs(0, tokens) + tokens * ends * KEY_TILE / 2
        return sequences * pairs * self._pair_seconds

    @property
    def _pair_seconds(self) -> float:
        """Of a layer's query and key, in all heads."""
        each, softmax = self.machine.score_seconds
        return self.work.scores * each + self.work.heads * softmax
