"""Slots, staging pages and what uses them on a device that computes late: whatever is promoted,
shrunk, switched off or given up meanwhile, every step gives the plain sum, every slot has one
holder, and the host's table is the device's."""

import os
import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # for tests that come later

from greenroom.experts import slots
from greenroom.experts.beside import ExpertsBeside
from greenroom.experts.limits import BESIDE_STAGED
from greenroom.experts.quota import Pace
from greenroom.experts.residency import EMPTY
from greenroom.experts.selfcheck import MOVES
from greenroom.experts.share import Rates, Share
from greenroom.experts.tiers import Tiers
from greenroom.experts.uselog import SEEN

from .late_device import Device
from .late_experts import GONE, SLABS, Account, Bank, Courier, D, F, K, patched, summed, value

SHORT, LONG = (1, 2, 7, 32), (33, 70, 300)


class Machine(RuleBasedStateMachine):
    """Steps of all kinds, in any order, of layers that differ."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()

    def teardown(self) -> None:
        if hasattr(self, "device"):
            self.device.synchronize()
        self.patch.undo()

    @initialize(
        seed=st.integers(0, 2**32),
        kinds=st.lists(
            st.tuples(st.sampled_from([0, 0, 0, 1, None]), st.sampled_from([3, 6, 6])),
            min_size=2,
            max_size=5,
        ),
        share=st.sampled_from([0.0, 0.3, 0.6, 0.8, 1.0]),
        pages=st.sampled_from([0, 2, 3, 8]),
        known=st.booleans(),
        reading=st.sampled_from([0.0, 1e9, 1e18]),
        guests=st.sampled_from([None, 1e-6, 1e-4]),
    )
    def load(self, seed, kinds, share, pages, known, reading, guests) -> None:
        self.random, self.device = random.Random(seed), Device(seed)
        self.patch.setattr(slots, "BURST", self.random.choice([1 / 8, 1.0, 1.0]))
        self.patch.setattr(slots, "BURST_BYTES", self.random.choice([2, 7, 30]) * max(SLABS))
        self.kernels = patched(self.patch, self.device)
        self.banks = [Bank(*kind, number) for number, kind in enumerate(kinds)]
        uniform = [bank for bank in self.banks if bank.uniform]
        self.account = Account(self.device)
        self.beside = 4 * len(uniform) * (SEEN + 6) + BESIDE_STAGED * 6  # tables
        everything = sum(bank.nbytes for bank in uniform)
        self.room = int(share * everything)
        self.staging = 4 * D * F + pages * max(SLABS) if pages else 0
        heat = None
        if known:  # the first layers' experts are the popular ones
            heat = np.random.default_rng(seed).random((len(self.banks), 6)) + 1
            heat /= np.arange(1, len(heat) + 1)[:, None]
        self.tiers = Tiers(self.account, self.room, self.staging, heat, K)
        if reading:
            meeting = self.random.choice([0.0, 1e-5])  # 1e-5: of two copies
            self.tiers.share = Share(Rates(1e9, reading, 1e18), meeting=meeting, route=0.0)
        courier = Courier(self.device)
        self.layers = [ExpertsBeside(bank, courier) for bank in self.banks]
        for layer in self.layers:
            self.tiers.add(layer)
        self.tiers.complete()
        in_ram = any(layer.crosses for layer in self.tiers._layers)
        if guests is not None and self.tiers._bus is not None and in_ram:  # seconds of one
            self.tiers.share_bus(Pace(1e-4, 1e-4, guests, guests, 0.0, 1.0))
            assert self.tiers.report()["bus"].startswith("of experts in RAM the GPU reads ")
        if known and self.tiers.slots is not None:
            for arena in self.tiers.slots.arenas:
                rows = [self.layers.index(self.tiers._layers[i]) for i in arena.layers]
                wanted = heat[rows, : arena.banks[0].experts]
                assert np.array_equal(arena.residency.heat, wanted)
        self.device.freed = self.spoil
        if self.tiers.slots is not None:
            self.tiers.slots.bus = 1e9
        if self.tiers.slots is not None:
            observe = self.tiers.slots.observe
            self.tiers.slots.observe = lambda uses: (self.observe(uses), observe(uses))
        self.count, self.exact = 0, True  # steps; whether all of them can be counted
        self.chosen = np.zeros((len(self.banks), 6), np.int64)
        self.counted = np.zeros((len(uniform), 6), np.int64)
        self.gone: list[torch.Tensor] = []

    # Steps

    def routes(self, bank: Bank, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        used = max(K, self.random.randint(2, bank.experts))  # the others are in no demand
        ids = np.array([self.random.sample(range(used), K) for _ in range(tokens)])
        weights = np.array([[self.random.randint(1, 9) for _ in range(K)] for _ in range(tokens)])
        return torch.from_numpy(ids), torch.from_numpy(weights.astype(np.float64))

    def step(self, tokens: int, last: int) -> np.ndarray:
        """Gives the device a step; the last layer computes only so many rows. How often every
        expert was chosen, (layers, 6)."""
        self.count += 1
        self.tiers.begin(tokens)
        chosen = np.zeros_like(self.chosen)
        for number, layer in enumerate(self.layers):
            rows = min(tokens, last) if layer is self.layers[-1] else tokens
            if rows:
                ids, weights = self.routes(layer.cpu, rows)
                chosen[number] = np.bincount(ids.view(-1), minlength=6)
                self.layer(layer, ids, weights)
        return chosen

    def layer(self, layer: ExpertsBeside, ids: torch.Tensor, weights: torch.Tensor) -> None:
        values = {e: int(v) for e, v in enumerate(layer.cpu.values)}
        wanted = summed(ids.numpy(), weights.numpy(), values)
        hidden = torch.zeros(len(ids), 1, dtype=torch.float64)
        self.exact &= layer.stream is not None or ids.numel() <= SEEN  # else it is not logged
        layer.start(hidden, ids, weights)
        found = layer.finish()

        def check() -> None:
            assert torch.equal(found, wanted)

        self.device.give(check)

    def replay(self, tokens: int) -> np.ndarray:
        """A step of which the host sees nothing."""
        chosen = self.step(tokens, tokens)
        if self.tiers.slots is not None:
            self.tiers.slots.log._written = None
        return chosen

    def done(self, tokens: int, chosen: np.ndarray) -> None:
        self.chosen += chosen
        self.tiers.settle()
        if self.tiers.slots is not None:
            self.tiers.slots.step_done(tokens, 1.0)

    def observe(self, uses: np.ndarray) -> None:
        self.counted[:, : uses.shape[1]] += uses

    @rule(tokens=st.sampled_from(SHORT), count=st.integers(1, 9))
    def decode(self, tokens, count) -> None:
        for _ in range(count):
            self.done(tokens, self.replay(tokens))

    @rule(tokens=st.sampled_from(LONG + SHORT), last=st.sampled_from([0, 1, 300]))
    def prefill(self, tokens, last) -> None:
        self.done(tokens, self.step(tokens, last))

    @rule(tokens=st.sampled_from(SHORT))
    def in_vain(self, tokens) -> None:
        """A step that was launched early and is not wanted."""
        self.replay(tokens)

    @rule(tokens=st.sampled_from(SHORT), seed=st.floats(0, 1))
    def others_are_in_demand(self, tokens, seed) -> None:
        """Who has a slot changes, step by step."""
        demand = np.random.default_rng(int(seed * 2**32))
        for _ in range(12):
            self.demand(demand)
            self.decode(tokens, 2)

    def demand(self, random: np.random.Generator) -> None:
        for arena in [] if self.tiers.slots is None else self.tiers.slots.arenas:
            arena.residency.warm(1000 * random.random(arena.residency.heat.shape))

    @rule(tokens=st.sampled_from(LONG), last=st.sampled_from([0, 1, 300]), seed=st.floats(0, 1))
    def prompt_of_others(self, tokens, last, seed) -> None:
        """It makes other experts hot: many are promoted at once."""
        self.demand(np.random.default_rng(int(seed * 2**32)))
        self.prefill(tokens, last)

    @rule()
    def wait(self) -> None:
        self.device.synchronize()

    @rule(using=st.booleans(), moves=st.sampled_from([0, 1, 4]))
    def judge(self, using, moves) -> None:
        if self.tiers.slots is not None:
            self.tiers.slots.check.using, self.tiers.slots.check.moves = using, moves

    @rule(tokens=st.sampled_from(LONG), groups=st.integers(1, 4), again=st.booleans())
    def fail(self, tokens, groups, again) -> None:
        """A long step finds no memory on its way."""
        self.kernels.fails = groups
        try:
            self.done(tokens, self.step(tokens, 1))
        except torch.OutOfMemoryError:
            self.abandon()
            self.exact = False
            if again and self.count > 60:  # as with `relieve`
                self.tiers.relieve()
        self.kernels.fails = 0

    @precondition(lambda self: self.count > 60)  # what was tried before was tried with slots
    @rule(taken=st.booleans())
    def relieve(self, taken) -> None:
        self.exact = False
        self.step(3, 3)
        self.abandon()
        self.account.failing, before = taken, self.account.used
        freed = self.tiers.relieve()
        self.account.failing = False
        assert before - self.account.used == freed

    def abandon(self) -> None:
        for layer in self.layers:
            layer.abandon()

    def spoil(self) -> None:
        """Memory is given back: whoever still reads it will see that."""
        held = [] if self.tiers.slots is None else [a.memory for a in self.tiers.slots.arenas]
        pages = {layer.stream.ring for layer in self.layers if layer.stream is not None}
        held += [page.data for ring in pages for page in (*ring._free, *ring.staged)]
        places = {tensor.untyped_storage().data_ptr() for tensor in held if tensor.numel()}
        for tensor in self.account.given:
            if tensor.untyped_storage().data_ptr() not in places:
                tensor.fill_(GONE)
                self.gone.append(tensor)
        self.account.given = [t for t in self.account.given if not any(t is g for g in self.gone)]

    # What holds at any time

    @invariant()
    def every_slot_has_one_holder(self) -> None:
        found = self.tiers.slots if hasattr(self, "tiers") else None
        for arena in () if found is None else found.arenas:
            table = arena.residency
            seats = table.slot_of[table.slot_of != EMPTY].tolist()
            assert len(set(seats)) == len(seats)
            assert max(seats, default=-1) < table.slots == len(arena.memory)
            assert sorted(move.slot for move in table.held) == sorted(seats)
            for row, i in zip(table.slot_of, arena.layers, strict=True):
                layer = found.layers[i]
                assert np.array_equal(found.seats[i, : len(row)], row)
                assert (found.seats[i, len(row) :] == EMPTY).all()
                assert layer.memory is arena.memory
                assert not layer.full or (row != EMPTY).all()
            for move in [] if found._moving is None else found._moving[1]:
                assert move[0] is not arena or move[1].slot not in seats

    @invariant()
    def no_more_is_booked_than_was_given(self) -> None:
        if hasattr(self, "tiers"):
            assert self.account.most <= self.room + self.staging + self.beside

    @rule()
    def look(self) -> None:
        """What the device has when it rests."""
        self.device.synchronize()
        assert all(bool((tensor == GONE).all()) for tensor in self.gone)
        found = self.tiers.slots
        if found is None:
            return
        assert np.array_equal(found.table.numpy(), np.where(found._in_use, found.seats, EMPTY))
        found.observe(found.log.take())
        for i, layer in enumerate(found.layers if self.exact else []):
            counted = self.chosen[self.layers.index(self.tiers._layers[i])]
            assert layer is None or np.array_equal(self.counted[i], counted)
        for arena in found.arenas:
            for move in arena.residency.held:
                owner = arena.banks[move.layer].values[move.expert]
                assert value(arena.memory.now[move.slot]) == owner


TestTiers = Machine.TestCase
TestTiers.settings = settings(
    max_examples=12, stateful_step_count=20, deadline=None,
    suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
)  # fmt: skip


@pytest.mark.parametrize("kinds", [[(0, 6)], [(None, 6), (0, 6)], [(0, 6), (0, 6)]])
@pytest.mark.parametrize("rows", [0, 7])
def test_the_last_layer_has_few_rows_or_none_and_nothing_staged(kinds, rows) -> None:
    """Short steps use the memory that long ones stage in: nothing may be under way there."""
    for seed in range(6):
        machine = Machine()
        machine.load(seed, kinds, 0.0, 8, False, 0.0, 1e-6)
        try:
            for _ in range(3):
                machine.prefill(70, rows)
                machine.decode(7, 1)
                machine.prefill(70, 300)
            machine.look()
        finally:
            machine.teardown()


@pytest.mark.parametrize("seed", range(12))
def test_a_long_walk(seed) -> None:
    """As the machine does, but longer, and with memory that suffices until late."""
    draw, machine = random.Random(seed), Machine()
    count = draw.randint(2, 4)
    kinds = [(draw.choice([0, 0, 0, 1, None]), draw.choice([3, 6, 6])) for _ in range(count)]
    if all(kind is None for kind, _ in kinds):
        kinds[0] = (0, 4)
    share, pages = draw.choice([0.0, 0.3, 0.6, 0.8]), draw.choice([2, 3, 8])
    try:
        machine.load(seed, kinds, share, pages, draw.random() < 0.5, draw.choice([0.0, 1e9, 1e18]),
                     draw.choice([None, 1e-6, 1e-4]))  # fmt: skip
        rules = [
            lambda: machine.decode(draw.choice(SHORT), 5),
            lambda: machine.prefill(draw.choice(LONG), draw.choice([0, 1, 300])),
            *[lambda: machine.others_are_in_demand(draw.choice(SHORT[:3]), draw.random())] * 3,
            lambda: machine.prompt_of_others(draw.choice(LONG), 1, draw.random()),
            lambda: machine.in_vain(3), machine.wait, machine.look,
            lambda: machine.judge(draw.random() < 0.8, draw.choice([1, 4])),
            lambda: machine.fail(draw.choice(LONG), draw.randint(1, 4), True),
        ]  # fmt: skip
        late = [*rules, lambda: machine.relieve(draw.random() < 0.3)]
        for number in range(40):
            draw.choice(rules if number < 30 else late)()
            machine.every_slot_has_one_holder()
            machine.no_more_is_booked_than_was_given()
        machine.look()
    finally:
        machine.teardown()


MEANWHILE = {
    "a token": lambda machine: machine.decode(1, 1),
    "tokens": lambda machine: machine.decode(7, 9),
    "a prompt": lambda machine: machine.prefill(300, 1),
    "another burst": lambda machine: machine.prompt_of_others(300, 1, 0.7),
    "a step that fails": lambda machine: machine.fail(70, 1, False),
    "fewer slots": lambda machine: machine.relieve(False),
    "no slots": lambda machine: machine.relieve(True),
    "promotions do not pay": lambda machine: machine.judge(True, 0),
    "slots do not pay": lambda machine: machine.judge(False, 0),
}


@pytest.mark.parametrize("meanwhile", list(MEANWHILE))
def test_while_many_are_promoted(meanwhile) -> None:
    began = 0
    for seed in range(8):
        machine = Machine()
        machine.load(seed, [(0, 6)] * 4 + [(1, 6)], 0.6, 3, False, 0.0, None)
        machine.patch.setattr(slots, "BURST", 1.0)
        machine.patch.setattr(slots, "BURST_BYTES", (6 + seed) * max(SLABS))
        try:
            machine.decode(1, slots.EVERY)
            machine.prompt_of_others(70, 1, seed / 8)
            machine.wait()
            machine.decode(1, 1)
            assert machine.tiers.slots is not None
            began += machine.tiers.slots._under_way > MOVES
            for _ in range(3):
                MEANWHILE[meanwhile](machine)
                machine.every_slot_has_one_holder()
                machine.decode(2, 2)
                machine.every_slot_has_one_holder()
            machine.no_more_is_booked_than_was_given()
            machine.look()
        finally:
            machine.teardown()
    assert began > 4
