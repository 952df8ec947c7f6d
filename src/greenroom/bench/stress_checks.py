"""What the stress test does to an engine. Each check loads the model itself, says in a sentence
what it did, and raises Failure where the engine did not keep a promise.
"""

import json
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import psutil

from greenroom.bench.stress import (
    PATIENCE,
    Check,
    Failure,
    Footprint,
    NotApplicable,
    Request,
    Subject,
    ask,
    prompt,
    settle,
    vram,
)
from greenroom.errors import (
    ContextLengthError,
    EngineClosedError,
    GreenroomError,
    RequestError,
)

if TYPE_CHECKING:
    from greenroom.engine import LLM

_NOISE = 16 << 20  # bytes that allocators may keep or not
_RELOADS = 5
_GRACE = 10.0  # seconds in which processes must be gone


def random_requests(subject: Subject) -> str:
    """Random prompts and answers, a third of them cancelled; nothing is left behind, and a fixed
    prompt is answered after it as before.
    """
    chance, done, cancelled = subject.random(), 0, 0
    with subject.load(max_sequences=4) as llm:
        engine = llm.engine
        known = prompt(chance, 24, engine)
        before = ask(engine, known, 16).finish()
        running: list[tuple[Request, int, bool]] = []
        end = time.monotonic() + subject.seconds
        while time.monotonic() < end or running:
            while len(running) < 8 and time.monotonic() < end:
                length = chance.randint(1, subject.context - 1)
                count = chance.randint(1, min(32, subject.context - length))
                request = ask(engine, prompt(chance, length, engine), count)
                running.append((request, count, chance.random() < 1 / 3))
            request, count, drop = running.pop(chance.randrange(len(running)))
            if drop:
                request.cancel()
                cancelled += 1
            elif len(request.finish()) != count or request.finish_reason != "length":
                raise Failure(f"{count} tokens were asked for, {len(request.tokens)} came")
            else:
                done += 1
        settle(engine)
        if ask(engine, known, 16).finish() != before:
            raise Failure("the same prompt is answered differently after the load")
    return f"{done} requests answered and {cancelled} cancelled; nothing left behind"


def context_limits(subject: Subject) -> str:
    """Requests at, over and far beyond what fits, and malformed ones."""
    chance = subject.random()
    with subject.load() as llm:
        engine, most = llm.engine, llm.engine.config.context_length
        full = prompt(chance, most - 1, engine)
        if len(ask(engine, full, 1).finish()) != 1:
            raise Failure("a request that just fits gave no token")
        open_end = ask(engine, full[: most - 5], None)
        if len(open_end.finish()) != 5 or open_end.finish_reason != "length":
            raise Failure(f"{len(open_end.tokens)} tokens where 5 fitted the context")
        vocabulary = engine.model_config.vocabulary_size
        for name, tokens, count, error in (
            ("one token too long", full, 2, ContextLengthError),
            ("ten times too long", full * 10, 1, ContextLengthError),
            ("an empty prompt", [], 1, RequestError),
            ("a token outside the vocabulary", [vocabulary], 1, RequestError),
            ("a negative token", [-1], 1, RequestError),
        ):
            try:
                ask(engine, tokens, count).cancel()
            except error:
                continue
            raise Failure(f"{name}: accepted")
        settle(engine)
    return f"full context of {most} tokens used to the last; 5 impossible requests refused"


def memory_pressure(subject: Subject) -> str:
    """More sequences than the cache holds; all must come through, by turns."""
    chance, many = subject.random(), 8
    tokens = subject.context
    with subject.load(max_sequences=many, cache_tokens=tokens) as llm:
        engine = llm.engine
        length, count = tokens // 4, tokens // 2
        requests = [ask(engine, prompt(chance, length, engine), count) for _ in range(many)]
        for request in requests:
            if len(request.finish()) != count:
                raise Failure(f"{count} tokens were asked for, {len(request.tokens)} came")
        stats = settle(engine)
    need = many * (length + count)
    return (
        f"{many} requests with {need} tokens in a cache of {tokens}: all complete, "
        f"{stats['preemptions']} preemptions"
    )


def expert_thrash(subject: Subject) -> str:
    """Ever new prompts, so that the experts in demand change all the time."""
    chance, steps = subject.random(), 0
    with subject.load(max_sequences=2) as llm:
        engine, memory = llm.engine, llm.engine.stats()["memory"]
        slots = sum(size for part, size in memory.items() if part.startswith("experts") and
                    part.endswith(".vram"))  # fmt: skip
        if engine.model_config.moe is None:
            raise NotApplicable("the model has no routed experts")
        if not slots or not memory.get("experts"):
            where = "VRAM" if slots else "RAM"
            raise NotApplicable(f"all experts are in {where}; there are no slots to fight for")
        known = prompt(chance, 24, engine)
        before = ask(engine, known, 16).finish()
        end = time.monotonic() + subject.seconds
        while time.monotonic() < end:
            steps += len(ask(engine, prompt(chance, 2, engine), 8).finish())
        settle(engine)
        after = ask(engine, known, 16).finish()
        same = sum(a == b for a, b in zip(before, after, strict=True))
    return f"{steps} tokens of ever new prompts; {same} of 16 tokens of a known answer as before"


def failures_inside(subject: Subject) -> str:
    """A step that fails takes its request with it and no other; a dead engine says so."""
    chance = subject.random()
    with subject.load() as llm:
        engine: Any = llm.engine
        known = prompt(chance, 8, engine)
        before = ask(engine, known, 8).finish()
        run = engine._runner.run
        engine._runner.run = _raise(RuntimeError("provoked"))
        try:
            ask(engine, known, 8).finish()
        except RuntimeError:
            pass
        else:
            raise Failure("a failed step went unnoticed")
        engine._runner.run = run
        settle(engine)
        if ask(engine, known, 8).finish() != before:
            raise Failure("after a failed step answers differ")
        engine._runner.run = _raise(SystemExit("provoked"))
        for what in ("running", "new"):
            try:
                ask(engine, known, 8).finish()
            except EngineClosedError:
                continue
            raise Failure(f"a {what} request does not learn that the engine's thread ended")
    return "a failed step failed alone; the end of the engine's thread reached every caller"


def _raise(error: BaseException) -> Any:
    def run(*_: object) -> None:
        raise error

    return run


def template_worker(subject: Subject) -> str:
    """The process that renders chat templates is killed between two uses."""
    with subject.load() as llm:
        chat = llm.engine.chat
        if chat is None or chat.source == "none":
            raise NotApplicable("the model has no chat template")
        messages = [{"role": "user", "content": "Hello"}]
        before = chat.render(messages)
        workers = [child for child in psutil.Process().children() if _renders(child)]
        if not workers:
            raise NotApplicable(f"the template ({chat.source}) needs no process of its own")
        for worker in workers:
            worker.kill()
        try:
            after = chat.render(messages)
        except GreenroomError:
            after = chat.render(messages)  # the first one may report the death, once
        if after != before:
            raise Failure("after the worker's death the template renders something else")
    return f"{len(workers)} worker killed; the next rendering started another"


def _renders(process: psutil.Process) -> bool:
    try:
        return any("template_worker" in part for part in process.cmdline())
    except psutil.Error:
        return False


def process_kill(subject: Subject) -> str:
    """A whole process is killed while it generates; nothing of it stays, and the file loads."""
    settings = json.dumps({"context_length": subject.context, **subject.settings})
    victim = [sys.executable, "-m", "greenroom.bench.stress_victim", str(subject.path), settings]
    with subprocess.Popen(victim, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        assert child.stdout is not None
        timer = threading.Timer(PATIENCE, child.kill)
        timer.start()
        try:
            seen = child.stdout.read(1)
            family = psutil.Process(child.pid).children(recursive=True) if seen else []
        finally:
            timer.cancel()
            child.send_signal(signal.SIGKILL)
    if not seen:
        raise Failure("a process that should generate wrote nothing")
    _, alive = psutil.wait_procs(family, timeout=_GRACE)
    if alive:
        raise Failure(f"{len(alive)} processes outlive the one that started them")
    with subject.load() as llm:
        ask(llm.engine, [1], 2).finish()
    return f"killed while generating; {len(family)} child processes went with it"


def reloading(subject: Subject) -> str:
    """Loaded and closed over and over; memory, files and threads stay, and no VRAM is held by
    what was closed."""

    def cycle() -> int:
        """Bytes of VRAM that stayed while somebody still knows the closed model."""
        before = vram()
        with subject.load() as llm:
            ask(llm.engine, [1, 2, 3], 2).finish()
        return vram() - before

    for _ in range(2):  # libraries keep what they need the first times
        cycle()
    before = Footprint.now()
    left = max(cycle() for _ in range(_RELOADS))
    if left > _NOISE:
        raise Failure(f"a closed model still holds {left / 2**20:.1f} MiB of VRAM")
    allowed = _NOISE + subject.path.stat().st_size // 10
    return f"{_RELOADS} more loads: " + Footprint.now().check_growth(before, allowed)


def leaks(subject: Subject) -> str:
    """The same kinds of requests for a while; the second half must not need more than the first."""
    chance, rounds = subject.random(), 0
    with subject.load(max_sequences=4) as llm:

        def work(seconds: float) -> None:
            nonlocal rounds
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                _round(llm, chance, subject.context)
                rounds += 1

        work(subject.seconds / 2)
        settle(llm.engine)
        before = Footprint.now()
        work(subject.seconds / 2)
        settle(llm.engine)
        growth = Footprint.now().check_growth(before, _NOISE)
    return f"{rounds} rounds of requests: {growth}"


def _round(llm: "LLM", chance: Any, context: int) -> None:
    engine = llm.engine
    requests = [ask(engine, prompt(chance, chance.randint(1, context // 2), engine), 8)
                for _ in range(4)]  # fmt: skip
    requests[0].cancel()
    for request in requests[1:]:
        request.finish()


CHECKS: dict[str, Check] = {
    "random requests": random_requests,
    "context limits": context_limits,
    "memory pressure": memory_pressure,
    "expert thrash": expert_thrash,
    "failures inside": failures_inside,
    "template worker": template_worker,
    "process kill": process_kill,
    "reloading": reloading,
    "leaks": leaks,
}
