"""Runs the model on the chunks of a step and hands each its rows or its token. Does not know what
they are used for, nor how chunks were chosen.
"""

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import Any, Protocol

import torch
from torch import Tensor

from greenroom.engine.collect import Collector, Found
from greenroom.engine.kv_cache import BlockCache
from greenroom.engine.layout import Layout
from greenroom.engine.scheduler import Chunk
from greenroom.errors import BudgetError
from greenroom.layers.batch import Batch, KVCache

log = logging.getLogger(__name__)


def _nothing() -> None:
    """There is nothing else to do."""


class KVSpecLike(Protocol):
    """The retention rule of a KV group."""

    @property
    def window(self) -> int | None: ...


class ModelLike(Protocol):
    """What the engine needs of a model."""

    config: Any

    @property
    def kv_groups(self) -> Items[KVSpecLike]: ...

    def new_caches(
        self, blocks: Items[int], block_size: int, dtype: torch.dtype
    ) -> list[KVCache]: ...

    def forward(self, batch: Batch, caches: Items[KVCache]) -> Tensor: ...

    def hidden(self, batch: Batch, caches: Items[KVCache]) -> Tensor: ...

    def memory(self) -> dict[str, int]: ...


class Runner:
    """Runs a model on the chunks of a step.

    Args:
        model: what computes.
        caches: keys and values, one per layer.
        blocks: who holds which block.
    """

    def __init__(self, model: ModelLike, caches: Items[KVCache], blocks: BlockCache) -> None:
        self.model = model
        self.caches = caches
        self._layout = Layout(blocks)
        self._step_done = getattr(model, "step_done", lambda tokens, seconds: None)
        self._launch = getattr(model, "launch", None)
        self._prepare = getattr(model, "prepare", None)
        self._collector = Collector()
        self._seconds = 0.0  # of the last step
        self._relieved = 0  # bytes given back

    def run(self, chunks: list[Chunk], meanwhile: Callable[[], None] = _nothing) -> list[Found]:
        """Computes the chunks.

        Args:
            chunks: at least one.
            meanwhile: called at least once, as early as what it takes delays no computation.

        Returns:
            The rows each chunk's sequence wants, maybe none, or its next token; see `Fetch.take`.
        """
        hidden = [chunk.sequence.want == "hidden" for chunk in chunks]
        if not any(hidden):
            return self._relieving(chunks, False, meanwhile)
        results: dict[int, Found] = {}
        for kind in (False, True):
            part = [(i, chunk) for i, chunk in enumerate(chunks) if hidden[i] == kind]
            if part:
                found = self._relieving([chunk for _, chunk in part], kind, meanwhile)
                results.update(zip((index for index, _ in part), found, strict=True))
        return [results[index] for index in range(len(chunks))]

    def _relieving(
        self, chunks: list[Chunk], hidden: bool, meanwhile: Callable[[], None]
    ) -> list[Found]:
        """`_run`, again with less of the experts in VRAM as long as memory does not suffice."""
        while (found := self._attempt(chunks, hidden, meanwhile)) is None:
            freed = getattr(self.model, "relieve", int)()
            if not freed:
                raise BudgetError(
                    "a step found no VRAM, and no expert is left there to make room; another "
                    "program may have taken it: close that, or lower --vram or --context"
                )
            if not self._relieved:
                log.warning(
                    "VRAM ran out in a step; %d MiB of experts left it. Another program may "
                    "have taken memory.", freed >> 20,
                )  # fmt: skip
            self._relieved += freed
        return found

    def _attempt(
        self, chunks: list[Chunk], hidden: bool, meanwhile: Callable[[], None]
    ) -> list[Found] | None:
        """`_run`, or None where memory did not suffice; the error's frames are gone then, and
        with them the tensors they held."""
        try:
            return self._run(chunks, hidden, meanwhile)
        except torch.OutOfMemoryError:
            self._abandon()
            return None
        except Exception:
            self._abandon()
            raise

    def _abandon(self) -> None:
        forget = getattr(self.model, "abandon", None)
        if forget is not None:
            forget()

    @torch.inference_mode()
    def _run(self, chunks: list[Chunk], hidden: bool, meanwhile: Callable[[], None]) -> list[Found]:
        batch, ends = self._layout(chunks)
        begun, before, self._seconds = time.perf_counter(), self._seconds, 0.0
        launched = None if hidden or self._launch is None else self._launch(batch, self.caches)
        if launched is None:
            meanwhile()
            begun = time.perf_counter()
            compute = self.model.hidden if hidden else self.model.forward
            fetch = self._collector.begin(compute(batch, self.caches), None, chunks, ends)
            self._step_done(len(batch.tokens), before)
        else:
            with launched.answering:
                fetch = self._collector.begin(launched.logits, launched.likeliest, chunks, ends)
                meanwhile()
                self._step_done(len(ends), before)
                following = self._layout.ahead(chunks)
                if following is not None and self._prepare is not None:
                    self._prepare(following, self.caches)
        found = fetch.take()
        self._seconds = time.perf_counter() - begun
        return found
