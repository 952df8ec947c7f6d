"""After a long step many experts are promoted at once: more routes hit from the first tokens on,
uniform routing moves nobody, and it costs a bounded part of what the step itself moved."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # for tests that come later

from greenroom.experts import slots as module
from greenroom.experts.residency import EMPTY
from greenroom.experts.selfcheck import WINDOW
from greenroom.experts.slots import Slots
from greenroom.layers.ledger import Ledger

from .late_experts import SLABS, Bank

LAYERS, EXPERTS, K = 8, 32, 4
SLAB = SLABS[0]
NEVER = 1 << 30


def slots_of(share: float, pinned: bool = True) -> Slots:
    """As many of every layer's experts have a slot: those of the lowest numbers."""
    banks = [Bank(0, EXPERTS, 0) for _ in range(LAYERS)]
    for bank in banks:
        bank.pinned = pinned
    tables = 4 * LAYERS * (module.SEEN + EXPERTS)
    nbytes = int(share * LAYERS * EXPERTS) * SLAB + tables
    slots = Slots(Ledger(torch.device("cpu")), banks, nbytes)
    slots.bus = 1e12
    return slots


class Text:
    """Routes whose popularity differs by expert, the more the higher `skew`."""

    def __init__(self, skew: float, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        ranks = np.stack([self.random.permutation(EXPERTS) + 1 for _ in range(LAYERS)])
        self.scores = -skew * np.log(ranks)

    def routes(self, tokens: int) -> np.ndarray:
        """(tokens, layers, K)"""
        noise = self.random.gumbel(size=(tokens, LAYERS, EXPERTS))
        return np.argsort(-(self.scores + noise), -1)[..., :K]


def counts(ids: np.ndarray) -> np.ndarray:
    """(layers, experts), how often each is chosen."""
    return np.stack([np.bincount(row.ravel(), minlength=EXPERTS) for row in ids.swapaxes(0, 1)])


def step(slots: Slots, ids: np.ndarray, last: int | None = None, before: float = 1.0) -> None:
    """Tells of a step; its last layer computes `last` rows only, and the step before took so many
    seconds."""
    uses = counts(ids)
    if last is not None:
        uses[-1] = counts(ids[len(ids) - last :])[-1]
    for layer, row in enumerate(uses.tolist()):
        slots.log.add(layer, row)
    slots.step_done(len(ids), before)


def answer(slots: Slots, text: Text, tokens: int) -> float:
    """Steps of a token each; returns their hit rate."""
    hits = 0.0
    for ids in text.routes(tokens):
        hits += (slots.seats[np.arange(LAYERS)[:, None], ids] != EMPTY).mean() / tokens
        step(slots, ids[None])
    return hits


@pytest.mark.parametrize(("share", "least"), [(0.25, 0.1), (0.6, 0.05)])
def test_answers_hit_what_their_prompts_used(share, least, monkeypatch) -> None:
    rates = []
    for part in (0.0, module.BURST):
        monkeypatch.setattr(module, "BURST", part)
        found = []
        for seed in range(4):
            slots, text = slots_of(share), Text(0.8, seed)
            step(slots, text.routes(512), last=1)
            found.append(answer(slots, text, 24))
        rates.append(np.mean(found))
    assert rates[1] > rates[0] + least


@pytest.mark.parametrize("tokens", [40, 128, 512, 2048])
def test_uniform_routing_moves_nobody(tokens, monkeypatch) -> None:
    monkeypatch.setattr(module, "EVERY", NEVER)
    moved = 0
    for seed in range(8):
        slots, text = slots_of(0.5), Text(0.0, seed)
        step(slots, text.routes(tokens), last=1)
        answer(slots, text, 4)
        moved += slots.stats["promoted_bytes"] // SLAB
    assert moved <= 4  # of 8 * 128 slots


def test_promotions_follow_one_text_after_another() -> None:
    """In a conversation whose texts differ no window hits more than the one before, and what was
    hot in one text gives way to the next."""
    slots, rates = slots_of(0.25), []
    slots.log.k = K
    for turn in range(24):
        text = Text(0.8, turn)
        step(slots, text.routes(512), last=1)
        rates.append(answer(slots, text, 100))
        assert slots.check.moves == module.MOVES
    assert np.mean(rates[12:]) > 0.46  # with a quarter of the experts by chance 0.25


@pytest.mark.parametrize(
    ("steps", "age"),
    [
        ([1, 1, 32], 3),
        ([1, 300], 1 + 300),
        ([1, 2000], 1 + 512),
        ([1, 2000, 2000, 500], 1 + 512 + 2),  # chunks of a prompt
        ([8, 300], 1 + 300 / 8),  # seven others were decoding
        ([1, 64, 64, 64], 1 + 64 + 2),  # many begin to decode
    ],
)
def test_what_was_hot_before_a_prompt_gets_older(steps, age) -> None:
    slots = slots_of(0.25)
    table = slots.arenas[0].residency
    step(slots, np.zeros((1, LAYERS, K), int))
    for tokens in steps:
        step(slots, np.ones((tokens, LAYERS, K), int))
    step(slots, np.full((1, LAYERS, K), 2))
    old, new = table.heat[0, [0, 2]]
    assert new / old == pytest.approx(2 ** ((1 + age) / 256))


def test_promotions_by_chance_pause() -> None:
    slots, text = slots_of(0.25), Text(0.0, 1)
    slots.log.k = K
    answer(slots, text, 2 * WINDOW)
    assert slots.stats["promotions"] > 2 * LAYERS
    assert slots.check.moves == 0


@pytest.fixture
def slots(monkeypatch) -> Slots:
    """A quarter of the experts have a slot, and only long steps promote."""
    monkeypatch.setattr(module, "EVERY", NEVER)
    return slots_of(0.25)


def promoted(slots: Slots) -> int:
    """How many in all, those under way among them."""
    return slots.stats["promoted_bytes"] // SLAB


def test_all_promotions_for_a_long_step_have_a_part_of_its_bytes(slots) -> None:
    text, most = Text(0.8, 1), 0
    for _ in range(4):  # chunks of a prompt
        before, routes = promoted(slots), text.routes(512)
        missed = int(((counts(routes) > 0) & (slots.seats == EMPTY)).sum())
        step(slots, routes)
        answer(slots, text, 8)
        assert promoted(slots) - before <= module.BURST * missed
        most = max(most, promoted(slots) - before)
    assert most >= 20  # of 192 without a slot


def test_a_step_has_few_beside_it_and_fewer_where_they_cost_much(slots, monkeypatch) -> None:
    monkeypatch.setattr(module, "BURST_BYTES", 8 * SLAB)
    text, begun = Text(0.8, 1), []
    step(slots, text.routes(512))
    for moves in (4, 4, 2, 0, 4):
        slots.check.moves = moves
        answer(slots, text, 1)
        begun.append(promoted(slots))
    assert begun == [8, 16, 20, 20, 20]  # what was still due when promotions paused is not


def test_what_waits_for_copies_is_no_more_than_the_longest_step_gives(slots) -> None:
    text = Text(0.8, 1)
    missed = EXPERTS * LAYERS * 3 // 4
    slots._moving = SimpleNamespace(query=lambda: False), []
    for _ in range(3):
        step(slots, text.routes(512))
    answer(slots, text, 1)
    slots._moving = None
    answer(slots, text, 8)
    assert module.MOVES < promoted(slots) <= module.BURST * missed


def test_who_does_not_use_the_slots_promotes_nobody(slots) -> None:
    slots.check.using = False
    step(slots, Text(0.8, 1).routes(512))
    answer(slots, Text(0.8, 1), 2)
    assert promoted(slots) == 0


def test_short_steps_promote_as_before(slots) -> None:
    text = Text(0.8, 1)
    for _ in range(20):
        step(slots, text.routes(32))
    assert promoted(slots) == 0


def test_where_copies_would_keep_the_host_waiting_there_is_no_burst(monkeypatch) -> None:
    monkeypatch.setattr(module, "EVERY", NEVER)
    slots = slots_of(0.25, pinned=False)
    step(slots, Text(0.8, 1).routes(512))
    answer(slots, Text(0.8, 1), 2)
    assert promoted(slots) == 0


def test_chunks_of_a_prompt_have_the_bus_to_themselves(slots) -> None:
    text = Text(0.8, 1)
    for _ in range(3):
        step(slots, text.routes(512))
        assert promoted(slots) == 0
    answer(slots, text, 1)
    assert promoted(slots) > module.MOVES


@pytest.mark.parametrize("seconds", [0.0, 0.01, 0.03])
def test_all_promotions_for_a_long_step_take_a_part_of_its_time(slots, seconds) -> None:
    """Wherever its experts were computed: the CPU may read them much faster than the bus."""
    text, slots.bus = Text(0.8, 1), 2000 * SLAB
    step(slots, text.routes(512))
    step(slots, text.routes(1), before=seconds)
    answer(slots, text, 8)
    assert promoted(slots) == int(module.BURST * seconds * 2000)


@pytest.mark.parametrize(("bus", "count"), [(0, 0), (100, 0), (625, 5), (1250, 10)])
def test_a_slow_bus_has_few_promotions_beside_a_step(slots, bus, count) -> None:
    text, slots.bus = Text(0.8, 1), bus * SLAB
    step(slots, text.routes(512))
    answer(slots, text, 1)
    assert promoted(slots) == count


def test_what_many_copies_cost_a_step_is_not_taken_for_what_few_do(slots, monkeypatch) -> None:
    text, told = Text(0.8, 1), []
    slots.log.k = K
    monkeypatch.setattr(slots.check, "step", lambda *step: told.append((step[1], step[5])))
    for tokens in (1, 1, 512, 1, 1, 1, 1):  # of each is told when the next is under way
        step(slots, text.routes(tokens))
    assert promoted(slots) > module.MOVES
    # nothing of the long step, nor of the one whose routes are counted with it
    assert told == [(1.0, False), (1.0, False), (0.0, True), (1.0, False)]
