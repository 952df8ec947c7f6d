"""One timed request or batch on an engine, from the time stamps of its tokens.

Knows of the engine only `generate(prompts, params)`, which gives each token the time it was
sampled; the clock is the same one, and can be another in tests.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from greenroom.bench.statistics import gaps
from greenroom.engine import SamplingParams

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Case:
    """What is asked at once: `batch` prompts of `prompt` tokens, `generate` tokens each."""

    prompt: int
    batch: int
    generate: int

    @property
    def name(self) -> str:
        """As tables and reports call it."""
        return f"{self.batch} x {self.prompt}+{self.generate}"


@dataclass(frozen=True, slots=True)
class Run:
    """What one run of a case took.

    Attributes:
        first: seconds to the first token, of each sequence.
        prefill: prompt tokens per second until every sequence has its first token.
        decode: tokens per second while all sequences are decoding; None with fewer than two.
        gaps: seconds between tokens of a sequence in that time.
        joules: the GPU's energy over the run, None where it is not counted.
    """

    first: tuple[float, ...]
    prefill: float
    decode: float | None
    gaps: tuple[float, ...]
    joules: float | None = None


def prompts(case: Case, vocabulary: int, seed: int) -> list[list[int]]:
    """Random token ids, new ones for every seed, so that no prefix is reused."""
    rng = np.random.default_rng([seed, case.prompt, case.batch])
    drawn: list[list[int]] = rng.integers(0, vocabulary, (case.batch, case.prompt)).tolist()
    return drawn


def run_case(llm: Any, case: Case, seed: int, clock: Clock = time.perf_counter) -> Run:
    """Asks for the case once; greedy, never ended by a token.

    Args:
        llm: an LLM, or what has its `generate` and `engine.model_config.vocabulary_size`.
        case: what to ask.
        seed: of the prompts.
        clock: the one the tokens' times are of.
    """
    asked = prompts(case, llm.engine.model_config.vocabulary_size, seed)
    params = SamplingParams(max_tokens=case.generate, temperature=0, ignore_eos=True)
    begin = clock()
    completions = llm.generate(asked, params)
    times = [[output.time for output in completion.outputs] for completion in completions]
    return timed(case, begin, times)


def timed(case: Case, begin: float, times: Sequence[Sequence[float]]) -> Run:
    """The run of which these are the tokens' times, (batch, generate) seconds."""
    first = tuple(row[0] - begin for row in times)
    started, ended = max(row[0] for row in times), min(row[-1] for row in times)
    decoding = [[t for t in row if started <= t <= ended] for row in times]
    count = sum(sum(t > started for t in row) for row in decoding)
    return Run(
        first=first,
        prefill=case.prompt * case.batch / max(first),
        decode=count / (ended - started) if ended > started else None,
        gaps=tuple(gap for row in decoding for gap in gaps(row)),
    )
