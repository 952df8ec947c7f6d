"""The stress test's frame: checks one after another, a verdict for each, and what they share.

A check gets a subject to load and returns what it saw, or fails with a sentence. A check that
hangs fails too: every wait has a limit. The checks themselves are in `stress_checks`.
"""

import gc
import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import psutil

from greenroom import __version__
from greenroom.errors import GreenroomError

if TYPE_CHECKING:
    from greenroom.engine import LLM
    from greenroom.engine.engine import Engine
    from greenroom.engine.jobs import Job

PATIENCE = 120.0  # seconds without a token that count as a hang
PASSED, FAILED, SKIPPED, INTERRUPTED = "passed", "failed", "not applicable", "interrupted"


class Failure(Exception):
    """What a check found wrong, in one sentence."""


class NotApplicable(Exception):
    """Why a check says nothing about this model on this machine."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a check ended.

    Attributes:
        name: of the check.
        status: "passed", "failed", "not applicable" or "interrupted".
        detail: a sentence: what was done, or what is wrong.
        seconds: it took.
    """

    name: str
    status: str
    detail: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is stressed, and for how long.

    Attributes:
        path: a GGUF file.
        settings: fields of EngineConfig that the user chose.
        seconds: for each of the checks that take as long as they are given.
        context: tokens of a request, prompt and answer.
        seed: of everything that is drawn.
    """

    path: Path
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 15
    context: int = 256
    seed: int = 0

    @contextmanager
    def load(self, **settings: Any) -> "Iterator[LLM]":
        """The model, with `settings` before the user's; closed at the end."""
        from greenroom.engine import LLM

        llm = LLM(self.path, **{"context_length": self.context, **self.settings, **settings})
        try:
            yield llm
        finally:
            llm.close()

    def random(self) -> random.Random:
        """The same numbers for every check and run."""
        return random.Random(self.seed)


Check = Callable[[Subject], str]


@dataclass(slots=True)
class Request:
    """A generation under way, taken token by token with a limit on each wait."""

    engine: "Engine"
    job: "Job"
    results: "SimpleQueue[Any]"
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    def step(self) -> bool:
        """Takes one token; False when that was the last.

        Raises:
            Failure: none came in time.
            GreenroomError: what ended the request.
        """
        try:
            item = self.results.get(timeout=PATIENCE)
        except Empty:
            raise Failure(f"no token within {PATIENCE:g} s") from None
        if isinstance(item, BaseException):
            raise item
        self.tokens.append(item.token_id)
        self.finish_reason = item.finish_reason
        return self.finish_reason is None

    def finish(self) -> list[int]:
        """Takes all tokens."""
        while self.step():
            pass
        return self.tokens

    def cancel(self) -> None:
        """Drops it."""
        self.engine.cancel(self.job)


def ask(engine: "Engine", tokens: Sequence[int], count: int | None) -> Request:
    """Starts a greedy generation of exactly `count` tokens; None: until the context is full."""
    from greenroom.engine.params import SamplingParams

    results: SimpleQueue[Any] = SimpleQueue()
    params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
    return Request(engine, engine.start(tokens, params, None, results.put), results)


def prompt(chance: random.Random, length: int, engine: "Engine") -> list[int]:
    """Random token ids."""
    vocabulary = int(engine.model_config.vocabulary_size)
    return [chance.randrange(vocabulary) for _ in range(length)]


def settle(engine: "Engine") -> dict[str, Any]:
    """The engine's statistics when nothing runs any more.

    Raises:
        Failure: requests or cache blocks are still held after a while.
    """
    end = time.monotonic() + PATIENCE
    while True:
        stats = engine.stats()
        held = sum(pool["held"] for pool in stats["cache"])
        if not (stats["running"] or stats["waiting"] or held):
            return stats
        if time.monotonic() > end:
            raise Failure(
                f"{stats['running']} requests run, {stats['waiting']} wait and {held} blocks are "
                "held, though nobody asks for anything"
            )
        time.sleep(0.01)


def vram() -> int:
    """Bytes of VRAM this process has given to tensors."""
    import torch  # seconds, if nothing was loaded yet

    return int(torch.cuda.memory_allocated()) if torch.cuda.is_available() else 0


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a process holds of things that leak."""

    files: int
    threads: int
    children: int
    bytes: int

    @classmethod
    def now(cls) -> "Footprint":
        """Of this process, after a collection of garbage."""
        gc.collect()
        this = psutil.Process()
        return cls(
            len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else this.num_fds(),
            this.num_threads(),
            len(this.children()),
            this.memory_info().rss,
        )

    def check_growth(self, before: "Footprint", allowed: int) -> str:
        """Says how much more this is than `before`.

        Raises:
            Failure: more files, threads or processes, or more than `allowed` bytes.
        """
        for name in ("files", "threads", "children"):
            grown = getattr(self, name) - getattr(before, name)
            if grown > 0:
                raise Failure(f"{grown} more {name} than before ({getattr(self, name)} now)")
        grown = self.bytes - before.bytes
        if grown > allowed:
            raise Failure(
                f"{grown / 2**20:.1f} MiB more memory than before; {allowed / 2**20:.1f} MiB "
                "would be noise"
            )
        return f"{grown / 2**20:+.1f} MiB, {self.files} files, {self.threads} threads"


def judge(name: str, check: Check, subject: Subject) -> Verdict:
    """Runs one check; whatever it raises becomes a verdict."""
    begin = time.monotonic()
    try:
        status, detail = PASSED, check(subject)
    except NotApplicable as reason:
        status, detail = SKIPPED, str(reason)
    except Failure as reason:
        status, detail = FAILED, str(reason)
    except KeyboardInterrupt:
        status, detail = INTERRUPTED, "stopped by the user"
    except Exception as error:
        kind = "" if isinstance(error, GreenroomError) else f"{type(error).__name__}: "
        status, detail = FAILED, kind + " ".join(str(error).split())
    return Verdict(name, status, detail, time.monotonic() - begin)


def run_checks(
    subject: Subject, checks: dict[str, Check], told: Callable[[Verdict], None]
) -> dict[str, Any]:
    """Runs all checks; an interrupt ends the one under way and those after it.

    Args:
        subject: what is stressed.
        checks: by name, in order.
        told: hears each verdict at once.

    Returns:
        A JSON-serialisable document of kind "stress"; "status" is the worst of the verdicts.
    """
    logger = logging.getLogger("greenroom.engine.engine")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # failures are provoked here; their traces say nothing
    verdicts = []
    try:
        for name, check in checks.items():
            verdict = judge(name, check, subject)
            verdicts.append(verdict)
            told(verdict)
            if verdict.status == INTERRUPTED:
                break
    finally:
        logger.setLevel(level)
    seen = {verdict.status for verdict in verdicts}
    return {
        "kind": "stress",
        "version": __version__,
        "model": subject.path.name,
        "seconds_per_check": subject.seconds,
        "context": subject.context,
        "seed": subject.seed,
        "status": next((s for s in (FAILED, INTERRUPTED) if s in seen), PASSED),
        "checks": [asdict(verdict) for verdict in verdicts],
    }
