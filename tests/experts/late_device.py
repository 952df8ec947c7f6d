"""A device that computes late: streams are queues of work, done at some time before the host waits
for it, in an order drawn at random that only events bind. Stands in for torch.cuda, so that tests
without a GPU see what a copy stream may overtake. Knows no experts."""

import random
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

AHEAD = 0.4  # chance that some work is done whenever the host gives more
OTHER = 0.05  # chance that another stream is held up from now on


class Device:
    """Streams and what is under way on them; the first one computes.

    Args:
        seed: of the order in which streams get on.

    Attributes:
        freed: called when the allocator gives back what nobody holds.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.streams: list[Stream] = []
        self.held: Stream | None = None
        self.freed: Callable[[], None] = lambda: None
        self.current = Stream(self)

    @property
    def busy(self) -> bool:
        return any(stream.work for stream in self.streams)

    def give(self, work: Callable[[], Any]) -> None:
        """Queues work on the current stream; it may return False to be asked again."""
        self.current.work.append(work)
        if self.random.random() < OTHER:
            self.held = self.random.choice([None, *self.streams])
        while self.random.random() < AHEAD:
            self.some(self.held)

    def some(self, held: "Stream | None" = None) -> bool:
        """Does the next thing of a stream drawn at random; whether there was one."""
        order = [stream for stream in self.streams if stream.work and stream is not held]
        self.random.shuffle(order)
        return any(stream.get_on() for stream in order)

    def until(self, done: Callable[[], bool]) -> None:
        while not done():
            assert self.some(self.held) or self.some(), "the host waits for what nobody will do"

    def synchronize(self, *_: Any) -> None:
        self.until(lambda: not self.busy)


class Stream:
    """Work in the order in which it was given."""

    def __init__(self, device: Device) -> None:
        self.device, self.work = device, deque[Callable[[], Any]]()
        device.streams.append(self)

    @property
    def cuda_stream(self) -> "Stream":
        return self

    def get_on(self) -> bool:
        if self.work[0]() is False:
            return False
        self.work.popleft()
        return True

    def wait_event(self, event: "Event") -> None:
        if event.mark is not None:
            mark = event.mark
            self.work.append(lambda: bool(mark))

    def wait_stream(self, other: "Stream") -> None:
        event = Event(self.device)
        event.record(other)
        self.wait_event(event)


class Event:
    """A place in a stream."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.mark: list[bool] | None = None  # of what was recorded last; empty until it is passed

    def record(self, stream: Stream | None = None) -> None:
        mark: list[bool] = []
        self.mark = mark
        (stream or self._device.current).work.append(lambda: mark.append(True))

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self._device.current).wait_event(self)

    def query(self) -> bool:
        return self.mark is None or bool(self.mark)

    def synchronize(self) -> None:
        self._device.until(self.query)


class Lazy(torch.Tensor):
    """Memory that a late device reads and writes; the host sees what is there now."""

    device_: Device
    is_cuda = True

    @staticmethod
    def of(tensor: torch.Tensor, device: Device) -> "Lazy":
        kind = type("Lazy", (Lazy,), {"device_": device})
        found: Lazy = tensor.as_subclass(kind)
        return found

    @property
    def now(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> "Lazy":
        there, given = self.now, source.as_subclass(torch.Tensor)
        self.device_.give(lambda: there.copy_(given))
        if not non_blocking:
            self.device_.synchronize()
        return self

    def fill_(self, value: float) -> "Lazy":
        there = self.now
        self.device_.give(lambda: there.fill_(value))
        return self

    def pin_memory(self) -> "Lazy":
        return self

    def numpy(self) -> np.ndarray:
        return self.now.numpy()


def torch_of(device: Device) -> Any:
    """What stands in for the module torch: as it is, but for memory and torch.cuda."""

    def lazy(make: Callable[..., torch.Tensor]) -> Callable[..., Lazy]:
        def made(*args: Any, **options: Any) -> Lazy:
            options.pop("device", None)
            options.pop("pin_memory", None)
            return Lazy.of(make(*args, **options), device)

        return made

    @contextmanager
    def stream(chosen: Stream) -> Any:
        before, device.current = device.current, chosen
        yield
        device.current = before

    cuda = SimpleNamespace(
        Event=lambda: Event(device), Stream=lambda *_: Stream(device), stream=stream,
        current_stream=lambda: device.current, synchronize=device.synchronize,
        empty_cache=lambda: device.freed(),
    )  # fmt: skip
    names = {name: lazy(getattr(torch, name)) for name in ("empty", "zeros", "from_numpy")}

    class Module:
        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    module = Module()
    module.__dict__.update(names, cuda=cuda)
    return module
