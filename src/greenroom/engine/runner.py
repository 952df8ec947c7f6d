"""Runs the model on the chunks of a step and hands each its rows or its token. Does not know what
they are used for, nor how chunks were chosen.
"""

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from greenroom.engine.collect import Collector, Fetch, Found
from greenroom.engine.kv_cache import BlockCache
from greenroom.engine.layout import Layout
from greenroom.engine.scheduler import Chunk
from greenroom.errors import BudgetError
from greenroom.layers.batch import Batch, KVCache, Launched

PAUSE = 32  # steps without looking ahead after a token that only the host could choose

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


@dataclass(slots=True)
class Early:
    """A step that was launched before the tokens it begins with were known to the host."""

    chunks: list[Chunk]
    launched: Launched


class Runner:
    """Runs a model on the chunks of a step.

    Where the model chains, a decode step may be launched while the one before it is computed: its
    tokens never leave the device on their way. It is computed in vain if no sequence goes on.

    Args:
        model: what computes.
        caches: keys and values, one per layer.
        blocks: who holds which block.

    Attributes:
        looks_ahead: whether steps may be launched early.
    """

    def __init__(self, model: ModelLike, caches: Items[KVCache], blocks: BlockCache) -> None:
        self.model = model
        self.caches = caches
        self._layout = Layout(blocks)
        self._step_done = getattr(model, "step_done", lambda tokens, seconds: None)
        self._launch: Any = getattr(model, "launch", None)
        self._prepare = getattr(model, "prepare", None)
        self._collector = Collector()
        self.looks_ahead, self._lasting = True, False
        self._early: Early | None = None
        self._pause = 0
        self._seconds = 0.0  # of the last step
        self._ended = 0.0  # when it ended
        self._relieved = 0  # bytes given back

    @property
    def under_way(self) -> list[Chunk] | None:
        """Chunks of a step that was launched early; `run` takes its results for this very list."""
        return None if self._early is None else self._early.chunks

    def settle(self) -> None:
        """Gives up a step that was launched early, if there is one. What it writes to the caches
        lies behind what is computed, and in blocks whose next owner writes later."""
        early, self._early = self._early, None
        if early is not None:
            try:
                with early.launched.answering:
                    pass
            except Exception as error:  # it concerns nobody
                log.warning("a step that was not needed failed: %s", error)

    def end(self) -> None:
        """After the last step: what a device still copies must not outlive the memory it is in."""
        self.settle()
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:  # told to whoever computed when it happened
                log.warning("the GPU had failed: %s", str(error).splitlines()[0])

    def run(
        self,
        chunks: list[Chunk],
        meanwhile: Callable[[], None] = _nothing,
        lasting: bool = False,
    ) -> list[Found]:
        """Computes the chunks.

        Args:
            chunks: at least one.
            meanwhile: called at least once, as early as what it takes delays no computation.
            lasting: whether the next step is likely to be of the same sequences; it may be
                launched then before this one is done.

        Returns:
            The rows each chunk's sequence wants, maybe none, or its next token; see `Fetch.take`.
        """
        self._lasting = lasting
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
        self.settle()
        forget = getattr(self.model, "abandon", None)
        if forget is not None:
            forget()

    @torch.inference_mode()
    def _run(self, chunks: list[Chunk], hidden: bool, meanwhile: Callable[[], None]) -> list[Found]:
        before, self._seconds = self._seconds, 0.0
        early, launched, begun = self._early, None, self._ended
        if early is not None and early.chunks is chunks:
            self._early, launched = None, early.launched
        else:
            self.settle()
            batch, ends = self._layout(chunks)
            begun = time.perf_counter()
            if self._launch is not None and not hidden:
                launched = self._launch(batch, self.caches)
        if launched is None:
            meanwhile()
            begun = time.perf_counter()
            compute = self.model.hidden if hidden else self.model.forward
            fetch = self._collector.begin(compute(batch, self.caches), None, chunks, ends)
            self._step_done(len(batch.tokens), before)
        else:
            fetch = self._beside(launched, chunks, before, meanwhile)
        found = fetch.take()
        self._ended = time.perf_counter()
        self._seconds = self._ended - begun
        if fetch.undecided:  # a step that was launched early began with no token
            self._pause = PAUSE
            self.settle()
        return found

    def _beside(
        self, launched: Launched, chunks: list[Chunk], before: float, meanwhile: Callable[[], None]
    ) -> Fetch:
        """Does all that can be done while a launched step is computed, up to launching the next.

        Args:
            before: seconds the step before took.
        """
        self._pause -= self._pause > 0
        chain = self._lasting and self.looks_ahead and not self._pause
        chain = chain and getattr(self.model, "chains", False)
        ends = range(1, len(chunks) + 1)
        with launched.answering:
            fetch = self._collector.begin(launched.logits, launched.likeliest, chunks, ends, chain)
            meanwhile()
            self._step_done(len(chunks), before)
            following = self._layout.ahead(chunks)
            if following is not None and fetch.there is None and self._prepare is not None:
                self._prepare(following, self.caches)
        if following is not None and fetch.there is not None:
            self._launch_early(chunks, following, fetch.there)
        return fetch

    def _launch_early(self, chunks: list[Chunk], following: Batch, tokens: Tensor) -> None:
        """Launches the step behind the chunks', which begins with tokens on the device."""
        try:
            launched = self._launch(following, self.caches, tokens)
        except Exception as error:  # it concerns nobody yet: what has come true is not lost for it
            log.debug("a step could not be launched early: %s", error)
            self._pause = PAUSE
            return
        if launched is not None:
            self._early = Early([Chunk(c.sequence, c.end, c.end + 1) for c in chunks], launched)
