"""On a CUDA device: wherever experts are, in RAM, in slots or on their way in long steps, and
however sequences share steps, the answers are the float32 CPU's.

All architectures get the same sizes and types, so that most kernels are compiled once.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from greenroom import native
from greenroom.convert.synth import Synthesis, write_synthetic
from greenroom.convert.synth_shapes import PUBLISHED, Shape
from greenroom.experts.pace import Pace
from greenroom.gguf import GGUFFile
from greenroom.layers.batch import Batch, KVGroup
from greenroom.models import LoadOptions, Model, load_model

pytestmark = pytest.mark.gpu

os.environ.pop("TRITON_INTERPRET", None)
DEVICE = "cuda"
SHAPES = (
    "gpt-oss-20b", "phi-3.5-moe", "grin-moe", "deepseek-moe-16b", "mixtral-8x7b", "qwen3-30b-a3b"
)  # fmt: skip
BUDGETS = {"none": -1.0, "part": 0.0, "minimal": 0.0, "half": 0.5, "all": 1.0}
BUDGETS |= {"guests": 0.0, "guests beside slots": 0.5}
EVEN = Pace(1e-4, 1e-5, 1e-4, 1e-4, 0.0, 1.0)  # about half of the experts in RAM come over the bus
SEQUENCES, BLOCK, BLOCKS = 3, 32, 8  # up to 256 tokens each

# Tokens that each step appends to each sequence: streamed, beside the CPU, a few, decoding often
# enough that graphs are recorded and replayed, streamed again.
STEPS = [(150, 40, 0), (1, 20, 0), (1, 1, 7), *[(1, 1, 1)] * 6, (0, 0, 180), *[(1, 0, 0)] * 6]


def small(name: str) -> Shape:
    """Two layers of an architecture, in sizes all share."""
    shape = PUBLISHED[name]
    return replace(
        shape, layers=2, hidden=256, heads=4, kv_heads=2, head_dim=64, experts=16,
        used=min(shape.used, 4), width=256, dense_width=512 if shape.dense_width else 0,
        vocabulary=4096, mix="MXFP4",
    )  # fmt: skip


class Run:
    """The sequences of one model, with blocks of their own."""

    def __init__(self, model: Model) -> None:
        self.model, self.groups = model, len(model.kv_groups)
        total = SEQUENCES * BLOCKS
        self.caches = model.new_caches([total] * self.groups, BLOCK, torch.float32)
        self.tables = torch.randperm(total, generator=torch.Generator().manual_seed(0))
        self.tables = self.tables.view(SEQUENCES, BLOCKS).int()
        self.lengths = [0] * SEQUENCES

    def step(self, counts: tuple[int, ...], tokens: torch.Tensor) -> torch.Tensor:
        """Appends counts[i] of tokens[i] to sequence i; log-probabilities of all of them."""
        picked = [i for i in range(SEQUENCES) if counts[i]]
        firsts, slots, parts, starts = [], [], [], [0]
        for i in picked:
            position = torch.arange(self.lengths[i], self.lengths[i] + counts[i])
            self.lengths[i] += counts[i]
            firsts.append(position)
            slots.append(self.tables[i][position // BLOCK].long() * BLOCK + position % BLOCK)
            parts.append(tokens[i][position])
            starts.append(starts[-1] + counts[i])
        batch = Batch(
            tokens=torch.cat(parts),
            positions=torch.cat(firsts),
            query_starts=torch.tensor(starts, dtype=torch.int32),
            context_lengths=torch.tensor([self.lengths[i] for i in picked], dtype=torch.int32),
            groups=(KVGroup(self.tables[picked], torch.cat(slots)),) * self.groups,
            output_rows=torch.arange(starts[-1]),
        )
        found = torch.log_softmax(self.model.forward(batch, self.caches).cpu().double(), -1)
        self.model.step_done(starts[-1])
        return found

    def all(self, steps: list[tuple[int, ...]], tokens: torch.Tensor) -> torch.Tensor:
        """(tokens of all sequences, vocabulary), sequence by sequence."""
        rows: list[list[torch.Tensor]] = [[] for _ in range(SEQUENCES)]
        for counts in steps:
            picked = [i for i in range(SEQUENCES) if counts[i]]
            parts = self.step(counts, tokens).split([counts[i] for i in picked])
            for i, part in zip(picked, parts, strict=True):
                rows[i].append(part)
        return torch.cat([part for row in rows for part in row])


TOKENS = torch.from_numpy(np.random.default_rng(0).integers(0, 300, (SEQUENCES, BLOCK * BLOCKS)))


@pytest.fixture(scope="module")
def pool():
    return native.lib().Pool(4)


@pytest.fixture(scope="module", params=SHAPES)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[GGUFFile, torch.Tensor]]:
    """A file, and what the reference says to each sequence in one pass."""
    path: Path = tmp_path_factory.mktemp("tiers") / "model.gguf"
    write_synthetic(Synthesis(small(request.param)), path)
    with GGUFFile(path) as file:
        model = load_model(file, LoadOptions(backend="reference"))
        whole = [tuple(map(sum, zip(*STEPS, strict=True)))]
        yield file, Run(model).all(whole, TOKENS)


def compare(found: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    divergence = float((wanted.exp() * (wanted - found)).sum(-1).mean())
    same = float((wanted.argmax(-1) == found.argmax(-1)).double().mean())
    print(f"{what}: {len(wanted)} positions, mean KL {divergence:.1e}, same {same:.4f}")
    assert divergence < 1e-3
    assert same >= 0.995


def on_device(file: GGUFFile, pool, share: float, layers: int | None = None) -> Model:
    """The model with this share of the experts' bytes for slots, and three staging slabs."""
    banks = [t for name, t in file.tensors.items() if "_exps." in name]
    everything = int(1.1 * sum(t.nbytes for t in banks)) + (64 << 10)
    options = LoadOptions(
        backend="cuda", device=DEVICE, pool=pool, slot_bytes=int(everything * share),
        staging_bytes=2 << 20, scratch_bytes=1 << 20, layers_on_gpu=layers,
        head_on_gpu=layers is None,
    )  # fmt: skip
    return load_model(file, options)


@pytest.mark.parametrize("budget", BUDGETS)
def test_every_budget_gives_the_answers_of_the_cpu(case, pool, budget: str) -> None:
    file, wanted = case
    share = BUDGETS[budget]
    if share < 0:
        model = load_model(file, LoadOptions(backend="native", pool=pool))
    else:
        model = on_device(file, pool, share, 1 if budget == "part" else None)
    if budget.startswith("guests"):
        model.backend.tiers.share_bus(EVEN)
        assert 0 < model.backend.tiers._bus.quota[:, 3].min() < 4
    found = Run(model).all(STEPS, TOKENS)
    name = file.metadata["general.name"]
    compare(found, wanted, f"{name}, {budget}")
    if budget in ("half", "all", "guests beside slots"):
        slots = model.backend.tiers.slots
        assert (slots.seats >= 0).any()
    if budget != "none":  # layers of the CPU come before the graph
        assert not model.waits
        assert model.graphs.usable
        assert model.graphs._graphs


@pytest.mark.parametrize("case", SHAPES[:1], indirect=True)
def test_answers_stay_the_same_after_thousands_of_promotions(case, pool) -> None:
    file, wanted = case
    model = on_device(file, pool, 0.5)
    slots, rng = model.backend.tiers.slots, np.random.default_rng(1)
    for _ in range(800):
        for arena in slots.arenas:
            arena.residency.warm(1000 * rng.random(arena.residency.heat.shape))
        slots.advance(4)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    slots.advance(0)
    assert slots.stats["promotions"] > 2000
    assert torch.equal(slots.table.cpu(), torch.from_numpy(slots.seats))
    compare(Run(model).all(STEPS, TOKENS), wanted, "after promotions")
