"""Experts, memory and stand-ins for kernels on a late device: what each reads, and when, is what
the real ones read. A slab tells whose it is, so that a result tells which slabs were read."""

import ctypes
import os
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # for tests that come later

from greenroom.experts import arena, beside, bus, ring, slots, stream, tiers, uselog
from greenroom.experts.slabs import SlabLayout
from greenroom.gguf import GGMLType
from greenroom.kernels.grouped import BASE, GROUP, ORDER, PLACE
from greenroom.kernels.guests import choose_guests_twin

from .late_device import Device, Lazy, Stream, torch_of

K = 2  # routes of a token
D, F = 4, 8
FEW_ROUTES = 160  # of a long step, up to which a full layer is multiplied from its blocks
FEW_ROWS = 20  # of an expert, up to which groups of those with slots may be large
SLABS = 4096, 6144  # bytes, of two layouts
NOBODY, GONE = 255, 254  # in memory that is new, or given back


class Bank:
    """Experts whose slabs tell whose they are."""

    activation, meter = "silu", None

    def __init__(self, kind: int | None, experts: int, number: int) -> None:
        self.experts, self.uniform, self.pinned = experts, kind is not None, True
        nbytes = SLABS[kind or 0]
        types = (GGMLType.Q8_0,) * 3
        self.layout = SlabLayout(D, F, types, ((0, 0),) * 3, None, nbytes)
        self.nbytes = nbytes * experts
        self.values = np.arange(experts) + 1 + 10 * number
        self.block = self.values.astype(np.uint8)[:, None].repeat(nbytes, 1)

    def slab(self, expert: int) -> np.ndarray:
        return self.block[expert]


def value(slab: torch.Tensor) -> int:
    """Whose slab it is; of one expert alone, or it was read while it changed."""
    found = slab.unique()
    assert len(found) == 1, "a slab is half one expert's and half another's"
    return int(found)


def now(memory: torch.Tensor) -> torch.Tensor:
    """What is there; pinned memory is no late one."""
    return memory.now if isinstance(memory, Lazy) else memory


def summed(ids: np.ndarray, weights: np.ndarray, values: dict[int, int]) -> torch.Tensor:
    """(tokens, 1): routes of the experts in `values`, weighted."""
    line = np.zeros(max([ids.max(initial=0), *values]) + 1)
    for expert, worth in values.items():
        line[expert] = worth
    return torch.from_numpy((line[ids] * weights).sum(1, keepdims=True))


class Account:
    """The device's memory: what is new in it is no expert's."""

    def __init__(self, device: Device) -> None:
        self.device, self.late = SimpleNamespace(type="cuda"), device
        self.used = self.most = 0
        self.failing = False
        self.given: list[torch.Tensor] = []

    def empty(self, part: str, shape: Any, dtype: torch.dtype) -> Lazy:
        tensor = torch.empty(*shape, dtype=dtype)
        self.used += tensor.nbytes
        self.most = max(self.most, self.used)
        if self.failing:
            raise torch.OutOfMemoryError("taken")
        tensor.view(-1).view(torch.uint8).fill_(NOBODY)
        self.given += [tensor] if dtype == torch.uint8 else []
        return Lazy.of(tensor, self.late)

    def release(self, part: str, nbytes: int) -> None:
        self.used -= nbytes


class Kernels:
    """Stand-ins for what is launched; they read memory when the device comes to them."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.fails = 0  # groups until one finds no memory

    def hits(self, memory, table, layout, hidden, ids, weights, activation, seen, cut, guests=None):
        out = torch.zeros(len(ids), 1, dtype=torch.float64)
        ids, weights = ids.numpy(), weights.numpy()
        known: dict[int, int] = {}

        def look() -> None:
            if seen is not None:
                seen.now[: ids.size] = torch.from_numpy(ids.reshape(-1))
            known.update((int(e), int(now(table)[int(e)])) for e in np.unique(ids))

        def add() -> None:
            there = {e: value(now(memory)[slot]) for e, slot in known.items() if slot >= 0}
            if guests is not None:
                places = now(guests.places).tolist()
                coming = [e for e, slot in known.items() if slot < 0 <= places[e]]
                there |= {e: value(now(guests.memory)[places[e]]) for e in coming}
            out.add_(summed(ids, weights, there))

        self.device.give(look)
        self.device.give(add)
        return out

    def fetch(self, guests) -> None:
        """Copies in two parts, as others may get between."""
        half = guests.memory.shape[1] // 2

        def copy(part: slice) -> None:
            for expert, place in enumerate(now(guests.places).tolist()):
                if place >= 0:
                    now(guests.memory)[place, part] = guests.source[expert, part]

        for part in (slice(half), slice(half, None)) if guests.fetched else ():
            self.device.give(partial(copy, part))

    def resident(self, layout, activation, experts, chunk):
        def many(memory, table, hidden, ids, weights):
            out = self.hits(memory, table, layout, hidden, ids, weights, activation, None, None)
            return out, self.starts(ids, experts)

        return _Mlp(many, lambda routes: routes <= FEW_ROUTES)

    def starts(self, ids, experts) -> Lazy:
        found = Lazy.of(torch.full((experts + 1,), -1, dtype=torch.int32), self.device)
        counts = np.bincount(ids.numpy().reshape(-1), minlength=experts)
        there = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
        self.device.give(lambda: found.now.copy_(there))
        return found

    def sort(self, ids, weights, table):
        starts = self.starts(ids, table.shape[1])
        return SimpleNamespace(ids=ids, weights=weights, table=table, starts=starts, tokens=None)

    def group(self, layout, activation, scratch):
        most = scratch.numel() // (2 * layout.d * layout.f)

        def compute(step, group, slabs) -> None:
            self.fails -= 1
            if self.fails == 0:
                raise torch.OutOfMemoryError("taken")
            self.device.give(lambda: self.add(step.out, step.routes, group, slabs))

        return _Mlp(compute, lambda rows, experts: rows <= FEW_ROWS * experts, most)

    def add(self, out, routes, group, slabs, answer=None) -> None:
        """The device's look at a group: its table must be that of this very step."""
        table = routes.table.now
        experts = table[ORDER, group.first : group.first + len(group.counts)].tolist()
        base, there = 0, {}
        for expert, count in zip(experts, group.counts, strict=True):
            assert table[GROUP, expert] == group.number
            assert table[BASE, expert] == base
            assert count == int((routes.ids == expert).sum()) > 0
            place, base = int(table[PLACE, expert]), base + count
            there[expert] = answer[expert] if answer else value(slabs.now[place])
        out.add_(summed(routes.ids.numpy(), routes.weights.numpy(), there))

    def add_rows(self, out, answer, scales, slabs, bias, routes, group, skip) -> None:
        self.device.give(lambda: self.add(out, routes, group, None, answer))

    def carry(self, source, target) -> None:
        self.device.give(lambda: target.now.copy_(source.now))


class _Mlp:
    def __init__(self, call, takes, most=0) -> None:
        self.call, self.takes, self.most = call, takes, most
        self.needs_no_scratch = takes

    def __call__(self, *arguments):
        return self.call(*arguments)


class Errands:
    """The CPU's part of a long step."""

    def __init__(self, device, layers) -> None:
        self.layers = layers

    def go(self, layer, hidden, tokens, starts, lent):
        return {e: self.layers[layer].values[e] for e in lent}

    def meet(self) -> None: ...
    def settle(self) -> None: ...
    def abandon(self) -> None: ...


class Courier:
    """Routes without a slot, to the CPU and back."""

    records = True

    def __init__(self, device: Device) -> None:
        self.device = device
        self.out: torch.Tensor | None = None

    def send(self, cpu, hidden, ids, weights, table, guests=None):
        assert self.out is None
        out = self.out = torch.zeros(len(ids), 1, dtype=torch.float64)

        def work() -> None:
            mine = ids
            if guests is not None:
                quota, places = now(guests.quota), now(guests.places)
                there = replace(guests, quota=quota, places=places)
                mine = choose_guests_twin(ids, None if table is None else table.now, there)
            wanted = set(mine.flatten().tolist()) - {-1}
            there = {e: int(cpu.values[e]) for e in wanted if table is None or table.now[e] < 0}
            out.add_(summed(ids.numpy(), weights.numpy(), there))

        self.device.give(work)
        return ids

    def fetch(self, hits, shared):
        out, self.out = self.out, None
        if hits is not None:
            self.device.give(lambda: out.add_(hits))
        return out

    def abandon(self) -> None:
        self.out = None


def upload(there: int, here: int, nbytes: int, stream: Stream) -> None:
    """The driver's way to begin a copy."""
    before, stream.device.current = stream.device.current, stream
    stream.device.give(lambda: ctypes.memmove(there, here, nbytes))
    stream.device.current = before


def patched(patch: pytest.MonkeyPatch, device: Device) -> Kernels:
    """The modules of this house on that device."""
    kernels, module = Kernels(device), torch_of(device)
    for part in (arena, ring, slots, stream, tiers, uselog):
        patch.setattr(part, "torch", module)
    patch.setattr(slots, "hits", kernels.hits)
    patch.setattr(bus, "hits", kernels.hits)
    patch.setattr(beside, "fetch", kernels.fetch)
    patch.setattr(slots, "ResidentMlp", kernels.resident)
    patch.setattr(stream, "Routes", kernels)
    patch.setattr(slots, "by_expert", lambda ids, n: (None, None, kernels.starts(ids, n)))
    patch.setattr(stream, "GroupMlp", kernels.group)
    patch.setattr(stream, "scaled_rows", lambda hidden: (hidden, hidden))
    patch.setattr(stream, "carry", kernels.carry)
    patch.setattr(stream, "add_rows", kernels.add_rows)
    patch.setattr(tiers, "Errands", Errands)
    patch.setattr(ring, "driver_upload", lambda: device.random.choice([None, upload]))
    return kernels
