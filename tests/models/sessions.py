"""A little engine for tests: blocks, tables and batches for a few sequences."""

from dataclasses import dataclass, field

import torch

from greenroom.layers.batch import Batch, KVGroup
from greenroom.models import Model


@dataclass
class Session:
    """Runs steps of a model; block ids are shuffled and unwritten cache is NaN, so that a read
    of the wrong place shows."""

    model: Model
    sequences: int = 1
    blocks: int = 16
    block_size: int = 4
    dtype: torch.dtype = torch.float32
    lengths: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lengths = [0] * self.sequences
        groups = len(self.model.kv_groups)
        total = self.sequences * self.blocks
        self.caches = self.model.new_caches([total] * groups, self.block_size, self.dtype)
        for cache in self.caches:
            cache.k.fill_(float("nan"))
            cache.v.fill_(float("nan"))
        generator = torch.Generator().manual_seed(len(self.caches))
        self.tables = [
            torch.randperm(total, generator=generator).view(self.sequences, self.blocks).int()
            for _ in range(groups)
        ]

    def batch(self, work: list[tuple[int, list[int]]], last_only: bool = False) -> Batch:
        """The step that appends tokens to sequences: [(sequence, tokens), ...]."""
        positions, starts, tables, rows = [], [0], [], []
        for sequence, tokens in work:
            first = self.lengths[sequence]
            self.lengths[sequence] += len(tokens)
            positions.append(torch.arange(first, first + len(tokens)))
            starts.append(starts[-1] + len(tokens))
            rows += [starts[-1] - 1] if last_only else range(starts[-2], starts[-1])
        picked = [sequence for sequence, _ in work]
        for group, spec in enumerate(self.model.kv_groups):
            table = self.tables[group][picked].clone()
            slots = []
            for i, position in enumerate(positions):
                block = table[i][position // self.block_size].long()
                slots.append(block * self.block_size + position % self.block_size)
                if spec.window is not None:  # blocks no query of this step can see
                    gone = max(int(position[0]) - spec.window + 1, 0) // self.block_size
                    table[i][:gone] = -1
            tables.append(KVGroup(table, torch.cat(slots)))
        return Batch(
            tokens=torch.tensor([token for _, tokens in work for token in tokens]),
            positions=torch.cat(positions),
            query_starts=torch.tensor(starts, dtype=torch.int32),
            context_lengths=torch.tensor([self.lengths[s] for s in picked], dtype=torch.int32),
            groups=tuple(tables),
            output_rows=torch.tensor(rows, dtype=torch.int64),
        )

    def step(self, work: list[tuple[int, list[int]]], last_only: bool = False) -> torch.Tensor:
        """(outputs, vocabulary) float32."""
        return self.model.forward(self.batch(work, last_only), self.caches)


def one_pass(model: Model, tokens: list[int], **more: int) -> torch.Tensor:
    """(tokens, vocabulary) float32 of one sequence in one step."""
    return Session(model, **more).step([(0, tokens)])


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest distance of a row, relative to the row's norm."""
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def divergence(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest KL(expected || found) of a position, in nats."""
    p, q = (torch.log_softmax(x.double(), -1) for x in (expected, found))
    return float((p.exp() * (p - q)).sum(-1).max())


def prompt(seed: int, length: int, vocabulary: int) -> list[int]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (length,), generator=generator).tolist()
