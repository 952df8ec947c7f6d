"""Whatever comes in whatever order (requests, cancellations, listeners that are gone, steps that
fail, memory that runs out, an engine that is closed), with pages for all or for one: every request
gets the tokens it would get alone, remembered pages hold what they stand for, and in the end all
pages are free."""

import codecs
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any
from unittest import mock

import torch
from fake_model import Chained, FakeModel, FakeTokenizer, fake_engine
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from greenroom.engine import Engine, SamplingParams
from greenroom.engine.collect import Collector
from greenroom.errors import EngineClosedError
from greenroom.layers.batch import Batch, KVCache

CONTEXT, SIZE, MOST = 48, 4, 20
BASE = SamplingParams(temperature=0, max_tokens=MOST, ignore_eos=True)
KINDS = {
    "greedy": BASE,
    "seeded": replace(BASE, temperature=0.9, seed=5),
    "top-k": replace(BASE, temperature=1.1, seed=6, top_k=12, min_p=0.02),
    "nucleus": replace(BASE, temperature=0.8, seed=7, top_p=0.9),
    "penalised": replace(BASE, repetition_penalty=1.4, presence_penalty=0.3),
    "biased": replace(BASE, temperature=0.7, seed=8, logit_bias={7: 1.5, 90: 2.0, 92: 2.0}),
    "told": replace(BASE, logprobs=2),
    "scored": replace(BASE, prompt_logprobs=1),
}
TOKENIZER = FakeTokenizer()


class Failing:
    """Fails in a step that is told to, before or after it has written to its caches."""

    def __init__(self, windows: Sequence[int | None]) -> None:
        super().__init__(windows)
        self.error: Exception | None = None
        self.late = False
        self.relieved = 0

    def relieve(self) -> int:
        self.relieved += 1
        return 1 << 20

    def hidden(self, batch: Batch, caches: Sequence[KVCache]) -> Tensor:
        error, self.error = self.error, None
        if error is not None and not self.late:
            raise error
        found = super().hidden(batch, caches)
        if error is not None:
            raise error
        return found


class FailingModel(Failing, FakeModel):
    pass


class FailingChained(Failing, Chained):
    pass


def stepped(model: FakeModel, **given: Any) -> Engine:
    """An engine without a thread: `advance` does what it would do."""
    with mock.patch.object(Engine, "_work", return_value=None):
        engine = fake_engine(model, block_size=SIZE, context_length=CONTEXT, **given)
    engine._runner._collector = Collector(remote=isinstance(model, Chained))
    return engine


def advance(engine: Engine) -> None:
    actions, engine._inbox = engine._inbox, []
    for action in actions:
        action()
    if engine._jobs:
        engine._step()
    else:
        engine._deliver()
        engine._runner.settle()


@cache
def alone(windows: tuple[int | None, ...], prompt: tuple[int, ...], kind: str) -> list[int]:
    """Up to MOST tokens of a request that has an engine to itself."""
    engine = stepped(FakeModel(windows), max_sequences=1, prefill_chunk=512, prefix_cache=False)
    found: list[int] = []
    most = min(MOST, CONTEXT - len(prompt))
    params = replace(KINDS[kind], max_tokens=most)
    engine.start(prompt, params, None, lambda item: found.append(item.token_id))
    while len(found) < most:
        advance(engine)
    return found


def told(tokens: list[int], params: SamplingParams) -> tuple[int, str, str]:
    """How many of the tokens come, their text and the finish reason."""
    text, utf8 = "", codecs.getincrementaldecoder("utf-8")("replace")
    for count, token in enumerate(tokens[: params.max_tokens], 1):
        if token in params.stop_token_ids:
            return count, text + utf8.decode(b"", final=True), "stop"
        text += utf8.decode(TOKENIZER.token_bytes(token))
        if params.stop and params.stop[0] in text:
            return count, text[: text.index(params.stop[0])], "stop"
    return count, text + utf8.decode(b"", final=True), "length"


class Request:
    """One request, what came of it, and what should."""

    def __init__(self, machine: "AnyOrder", prompt: list[int], kind: str, most: int) -> None:
        self.machine, self.prompt, self.kind = machine, prompt, kind
        self.most = min(most, CONTEXT - len(prompt))
        self.params = replace(KINDS[kind], max_tokens=self.most)
        self.items: list[Any] = []
        self.leaves_at = MOST + 1
        self.cancelled = False
        self.job: Any = None

    @property
    def expected(self) -> list[int]:
        return alone(self.machine.windows, tuple(self.prompt), self.kind)

    @property
    def over(self) -> bool:
        last = self.items[-1] if self.items else None
        return isinstance(last, Exception) or getattr(last, "finish_reason", None) is not None

    def sink(self, item: Any) -> None:
        assert not self.over, "something came after the end"
        self.items.append(item)
        if len(self.items) >= self.leaves_at:
            self.cancelled = True
            raise RuntimeError("nobody listens")

    def check(self, closed: bool) -> None:
        count, text, reason = told(self.expected, self.params)
        outputs = [item for item in self.items if not isinstance(item, Exception)]
        got = [output.token_id for output in outputs]
        assert got == self.expected[: len(got)]
        if outputs and self.kind == "scored":
            assert len(outputs[0].prompt_logprobs) == len(self.prompt)
        if len(got) == count:
            assert outputs[-1].finish_reason == reason
            assert "".join(output.text for output in outputs) == text
            return
        assert len(got) < count, "tokens came after the end"
        if len(outputs) < len(self.items):
            error = self.items[-1]
            broken = self.machine.broken and str(error) == "broken"
            assert broken or (closed and isinstance(error, EngineClosedError))
        else:
            assert self.cancelled, "the rest is missing"


class AnyOrder(RuleBasedStateMachine):
    """See above."""

    windows: tuple[int | None, ...] = (None,)

    @initialize(
        windows=st.sampled_from([(None,), (5,), (None, 6), (None, 3, 17)]),
        rows=st.sampled_from([1, 2, 4, 6]),
        room=st.sampled_from([48, 48, 64, None]),
        chunk=st.sampled_from([1, 5, 16]),
        prefix=st.sampled_from([False, True, "1MiB"]),
        chained=st.booleans(),
        closes=st.sampled_from([False] * 5 + [True]),
    )
    def begin(
        self, windows: Any, rows: int, room: Any, chunk: int, prefix: Any, chained: bool,
        closes: bool,
    ) -> None:  # fmt: skip
        self.windows, self.broken, self.closed = windows, False, closes
        self.patches = [
            mock.patch(f"greenroom.{module}.HEAD", 12)  # wider nuclei are left to the host
            for module in ("layers.choice", "engine.sampler")
        ]
        for patch in self.patches:
            patch.start()
        self.model: Any = (FailingChained if chained else FailingModel)(windows)
        self.engine = stepped(
            self.model, max_sequences=rows, cache_tokens=room, prefill_chunk=chunk,
            prefix_cache=bool(prefix), prefix_ram=prefix if isinstance(prefix, str) else 0,
        )  # fmt: skip
        self.requests: list[Request] = []
        self.sequences: list[Any] = []
        self.names: dict[bytes, tuple[int, list[int]]] = {}

    def enter(self, request: Request) -> None:
        request.job = self.engine.start(request.prompt, request.params, None, request.sink)
        self.requests.append(request)
        self.sequences.append(request.job.sequence)

    @rule(
        family=st.integers(0, 2), fork=st.integers(0, 24),
        length=st.one_of(st.integers(1, 8), st.integers(1, 30)),
        kind=st.sampled_from([*KINDS, "greedy", "greedy"]),
        most=st.one_of(st.just(MOST), st.integers(1, MOST)),
    )  # fmt: skip
    def submit(self, family: int, fork: int, length: int, kind: str, most: int) -> None:
        prompt = [1 + (family * 31 + i * 7 + i * i) % 80 for i in range(length)]
        prompt[fork:] = [1 + (3 * i) % 80 for i in range(fork, length)]
        self.enter(Request(self, prompt, kind, most))

    @rule(
        at=st.integers(1, MOST - 1), text=st.booleans(), length=st.integers(1, 12),
        kind=st.sampled_from(["greedy", "greedy", "seeded", "penalised"]),
    )  # fmt: skip
    def submit_with_a_stop(self, at: int, text: bool, length: int, kind: str) -> None:
        request = Request(self, list(range(2, 2 + length)), kind, MOST)
        stop: dict[str, Any] = {"stop_token_ids": (request.expected[at],)}
        if text:
            letters = told(request.expected[at : at + 2], KINDS[kind])[1].strip("\ufffd")
            stop = {"stop": (letters,)} if letters else {}
        request.params = replace(request.params, **stop)
        self.enter(request)

    @precondition(lambda self: any(request.over for request in self.requests))
    @rule(which=st.integers(0, 20), more=st.integers(1, 5))
    def go_on(self, which: int, more: int) -> None:
        """The next turn of a conversation."""
        ended = [request for request in self.requests if request.over]
        last = ended[which % len(ended)]
        said = [item.token_id for item in last.items if not isinstance(item, Exception)]
        prompt = [*last.prompt, *said, *range(50, 50 + more)][: CONTEXT - 2]
        self.enter(Request(self, prompt, "greedy", 6))

    @rule(length=st.integers(1, 20), hidden=st.booleans())
    def ask_for_rows(self, length: int, hidden: bool) -> None:
        start = self.engine.start_embedding if hidden else self.engine.start_scoring
        self.sequences.append(start(list(range(1, 1 + length)), lambda item: None).sequence)

    @rule(count=st.integers(1, 12))
    def advance(self, count: int) -> None:
        for _ in range(count):
            advance(self.engine)
            self.remembered_pages_hold_what_they_stand_for()

    @precondition(lambda self: self.requests)
    @rule(which=st.integers(0, 20))
    def cancel(self, which: int) -> None:
        request = self.requests[which % len(self.requests)]
        request.cancelled = True
        self.engine.cancel(request.job)

    @precondition(lambda self: self.requests)
    @rule(which=st.integers(0, 20))
    def leave(self, which: int) -> None:
        request = self.requests[which % len(self.requests)]
        request.leaves_at = len(request.items) + 1

    @rule(out_of_memory=st.booleans(), late=st.booleans())
    def fail(self, out_of_memory: bool, late: bool) -> None:
        error = torch.OutOfMemoryError("none left") if out_of_memory else RuntimeError("broken")
        self.model.error, self.model.late = error, late
        self.broken |= not out_of_memory

    @invariant()
    def pages_are_counted(self) -> None:
        if not hasattr(self, "engine"):
            return
        blocks, running = self.engine._blocks, self.engine._scheduler.running
        for group, pool in enumerate(blocks.pools):
            held = [block for s in running for block in s.blocks[group] if block >= 0]
            assert pool.references == [held.count(block) for block in range(pool.size)]
            free = blocks.tables[group][blocks.free_rows]
            assert (free == -1).all()

    def remembered_pages_hold_what_they_stand_for(self) -> None:
        for sequence in self.sequences:
            for index, digest in enumerate(sequence.digests):
                part = sequence.tokens[index * SIZE : (index + 1) * SIZE]
                assert self.names.setdefault(digest, (index, part)) == (index, part)
        self.sequences = [s for s in self.sequences if s in self.engine._jobs]
        for pool, kv in zip(self.engine._blocks.pools, self.engine._runner.caches, strict=True):
            if not pool.known:
                continue
            first, tokens = zip(*(self.names[digest] for digest in pool.known), strict=True)
            where = torch.tensor(first)[:, None] * SIZE + torch.arange(SIZE)
            expected = self.model.embedding[torch.tensor(tokens)] * (1 + where % 5)[..., None]
            assert torch.equal(kv.v[list(pool.known.values()), 0], expected)

    def teardown(self) -> None:
        engine = getattr(self, "engine", None)
        if engine is None:
            return
        try:
            self.end(engine)
        finally:
            for patch in self.patches:
                patch.stop()

    def end(self, engine: Engine) -> None:
        for _ in range(0 if self.closed else 4000):
            if not (engine._inbox or engine._jobs or engine._ready):
                break
            advance(engine)
        runner = engine._runner
        engine.close()
        engine._work()
        for request in self.requests:
            request.check(self.closed)
        stats = engine.stats()
        assert [stats["running"], stats["waiting"], engine._jobs] == [0, 0, {}]
        assert all(group["held"] == 0 for group in stats["cache"])
        assert len(engine._blocks.free_rows) == engine.config.max_sequences
        assert runner.under_way is None
        assert getattr(self.model, "open", 0) == 0


AnyOrder.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestAnyOrder = AnyOrder.TestCase
