"""Numbers that computing experts and planning it must agree on; without torch, as planning is."""

import math

# Of a group of experts computed at a time, and no more than tokens; bounds scratch. Of 8192 tokens
# four experts of gpt-oss get about 4096 rows: a little more, so that most pages are one group.
EXPERT_ROWS = 4608
FEW_ROWS = 128  # of an expert, on average: with more, expanding its matrices first is faster
SHORT_STEP = 32  # tokens; longer steps stream experts
STREAMED = 16  # bytes an expert takes in the table of who is computed when in a long step
# The same, and in the tables of who comes over the bus in short ones.
BESIDE_STAGED = STREAMED + 4 * (SHORT_STEP + 1)
PAGES = 4  # of staging memory that can be on their way at once
PAGE_BYTES = 56 << 20  # about a millisecond on the bus
PAGE_EXPERTS = 16  # most of a page, as kernels compute so many at once
STEPS = 4  # to a factor of two, of what was measured
LEAST = 1e-7  # that is measured


def rounded(value: float, steps: int = STEPS) -> float:
    """What was measured, as the nearest power of two in so many steps, and no less than `LEAST`:
    another run seldom shares experts out in another way, and with it changes the text."""
    return float(2 ** (round(steps * math.log2(max(LEAST, value))) / steps))


def pages_of(nbytes: int, slab: int, expanded: int, experts: int) -> tuple[int, int]:
    """Pages of staging memory and experts of a page: as many of those as the launches of a group
    are worth, while at least `PAGES` can be on their way.

    Args:
        nbytes: of the pages, and of a page's experts expanded.
        slab, expanded: bytes of one expert.
        experts: of a layer.
    """
    wanted = min(PAGE_EXPERTS, experts, max(1, PAGE_BYTES // slab))
    slabs = min(wanted, nbytes // (expanded + PAGES * slab))
    if slabs < 1:
        return max(0, nbytes - expanded) // slab, 1
    return (nbytes - slabs * expanded) // (slabs * slab), slabs
