"""A deterministic model of a few lines that reads its cache the way attention does.

Its logits depend on every token it can see in the cache: with a wrong block table, slot or
window, or a block given away too early, they change.
"""

import codecs
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from greenroom.engine import Engine, EngineConfig, assemble
from greenroom.layers.batch import Batch, KVCache, Launched
from greenroom.layers.choice import likeliest


@dataclass(frozen=True)
class Spec:
    window: int | None


@dataclass(frozen=True)
class Config:
    vocabulary_size: int
    context_length: int


class FakeModel:
    """One layer per group; a layer's state is a sum over the visible tokens."""

    def __init__(
        self, windows: Sequence[int | None] = (None,), vocabulary: int = 97, context: int = 512
    ) -> None:
        self.kv_groups = tuple(Spec(window) for window in windows)
        self.config = Config(vocabulary, context)
        generator = torch.Generator().manual_seed(7)
        self.embedding = torch.randn(vocabulary, 8, generator=generator)
        self.head = torch.randn(len(windows) * 8, vocabulary, generator=generator)
        self.steps: list[Batch] = []

    def new_caches(
        self, blocks: Sequence[int], block_size: int, dtype: torch.dtype
    ) -> list[KVCache]:
        shapes = [(count, 1, block_size, 8) for count in blocks]
        nan = float("nan")  # reading what was never written shows
        return [
            KVCache(torch.full(s, nan, dtype=dtype), torch.full(s, nan, dtype=dtype))
            for s in shapes
        ]

    def forward(self, batch: Batch, caches: Sequence[KVCache]) -> Tensor:
        self.steps.append(batch)
        # In float64, so that the same row gives the same float32 in any company.
        return (self.hidden(batch, caches).double() @ self.head.double()).float()

    def hidden(self, batch: Batch, caches: Sequence[KVCache]) -> Tensor:
        states = []
        for spec, group, cache in zip(self.kv_groups, batch.groups, caches, strict=True):
            size = cache.k.shape[2]
            value = self.embedding[batch.tokens] * (1 + batch.positions % 5)[:, None]
            cache.v[group.slots // size, 0, group.slots % size] = value.to(cache.v.dtype)
            rows = []
            for index in range(len(batch.context_lengths)):
                first, last = batch.query_starts[index : index + 2].tolist()
                for row in range(first, last):
                    end = int(batch.positions[row]) + 1
                    begin = max(0, end - spec.window) if spec.window else 0
                    where = torch.arange(begin, end)
                    table = group.block_tables[index].long()
                    seen = cache.v[table[where // size], 0, where % size].float()
                    rows.append((seen * torch.linspace(0.5, 1.5, end)[begin:, None]).mean(0))
            states.append(torch.stack(rows))
        hidden = torch.cat(states, 1)
        return torch.tanh(hidden[batch.output_rows] * 3)

    def memory(self) -> dict[str, int]:
        return {"experts": 0, "dense": self.head.nbytes, "embedding": self.embedding.nbytes}


class Chained(FakeModel):
    """Decode steps are launched and may go on with tokens that never left the "device"; what one
    leaves is overwritten by the next, as in a recorded step."""

    chains = True

    def __init__(self, windows: Sequence[int | None] = (None, 6)) -> None:
        super().__init__(windows)
        self.launched = self.early = self.open = 0
        self.fails_at = 10**9
        self._left: dict[int, tuple[Tensor, Tensor]] = {}

    def launch(
        self, batch: Batch, caches: Sequence[KVCache], chosen: Tensor | None = None
    ) -> Launched | None:
        count = len(batch.tokens)
        if not batch.tokens.shape == batch.context_lengths.shape == batch.output_rows.shape:
            return None  # no decode step: tests/models/test_decode_graphs.py
        if self.launched >= self.fails_at:
            raise RuntimeError("the device is gone")
        self.launched += 1
        if chosen is not None:
            self.early += 1
            batch.tokens[:] = chosen.clamp(min=0)
        found = super().forward(batch, caches)
        logits, best = self._left.setdefault(count, (found.clone(), likeliest(found)))
        logits.copy_(found)
        best.copy_(likeliest(found))
        with ExitStack() as answering:
            answering.enter_context(self.answer())
            return Launched(logits, best, answering.pop_all())

    @contextmanager
    def answer(self) -> Iterator[None]:
        assert self.open == 0, "two steps are answered at once"
        self.open += 1
        try:
            yield
        finally:
            self.open -= 1


PIECES = {90: b"\xc3", 91: b"\xa9", 92: b"\xe2\x82", 93: b"\xac"}


class FakeTokenizer:
    """Token i is a letter, or a piece of one: ids from 90 on are bytes of 'é' and '€'."""

    vocabulary_size = 97
    bos_id, eos_id = None, 0
    eog_ids = frozenset({0})

    def token_bytes(self, token: int) -> bytes:
        return PIECES.get(token, bytes([33 + token % 60]))

    def encode(self, text: str, add_special: bool = False) -> list[int]:
        return [(ord(letter) - 33) % 90 for letter in text]

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def stream(self, context: Iterable[int] = ()) -> "FakeDecoder":
        return FakeDecoder(self)


class FakeDecoder:
    def __init__(self, tokenizer: FakeTokenizer) -> None:
        self.tokenizer = tokenizer
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self.utf8.decode(self.tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        return self.utf8.decode(b"", final=True)


def fake_engine(model: FakeModel | None = None, **settings: object) -> Engine:
    settings = {"kv_type": "f32", "block_size": 4, "prefill_chunk": 16, "threads": 1, **settings}
    return assemble(model or FakeModel(), FakeTokenizer(), EngineConfig(**settings))
