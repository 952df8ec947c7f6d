"""Brings what a step left on its device to the host: tokens where they can be chosen there, rows
of logits or states where somebody wants to see them. Knows neither models nor requests.
"""

from collections.abc import Sequence as Items
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from greenroom.engine.scheduler import Chunk
from greenroom.layers.choice import UNDECIDED, likeliest

Rows = NDArray[np.float32]  # (rows, vocabulary) logits or (rows, hidden) states
Found = Rows | int  # or the token that was chosen on the device

MOST_PINNED = 32 << 20  # bytes of rows that are fetched through memory kept for it


class Fetch:
    """One step's results on their way.

    Attributes:
        rows: (rows, width) float32, of all chunks, where they were computed.
        ends: row behind each chunk's.
        tokens: (rows,) int64 in RAM, chosen ones; None if there are none.
        views: for each chunk, its rows in RAM if they are fetched, or None.
        arrived: when tokens and views are there.
    """

    def __init__(self, rows: Tensor, ends: Items[int]) -> None:
        self.rows, self.ends = rows, ends
        self.tokens: Tensor | None = None
        self.chosen: list[bool] = [False] * len(ends)
        self.views: list[Tensor | None] = [None] * len(ends)
        self.arrived: Any = None

    def take(self) -> list[Found]:
        """Waits; the token or the rows of each chunk. Rows of a sequence that only wants the
        next token are overwritten by the next step."""
        if self.arrived is not None:
            self.arrived.synchronize()
        tokens = [] if self.tokens is None else self.tokens.tolist()
        found: list[Found] = []
        first = 0
        for index, end in enumerate(self.ends):
            view = self.views[index]
            if self.chosen[index] and tokens[first] != UNDECIDED:
                found.append(tokens[first])
            else:
                found.append((self.rows[first:end].cpu() if view is None else view).numpy())
            first = end
        return found


class Collector:
    """Fetches results, step by step, through pinned memory.

    Args:
        remote: treat rows in RAM as if they were on a device; for tests.
    """

    def __init__(self, remote: bool = False) -> None:
        self._remote = remote
        self._tokens = torch.empty(0, dtype=torch.int64)
        self._rows = torch.empty(0)

    def begin(
        self, rows: Tensor, tokens: Tensor | None, chunks: Items[Chunk], ends: Items[int]
    ) -> Fetch:
        """Begins to fetch; returns before the device is done.

        Args:
            rows: (rows, width) float32, of all chunks; they stay until the next step.
            tokens: (rows,) int64, the likeliest of each row, if that is known already.
            chunks: of the step.
            ends: row behind each chunk's.
        """
        fetch = Fetch(rows, ends)
        if not (rows.is_cuda or self._remote):
            return fetch
        last, plain = 0, []
        for index, (chunk, end) in enumerate(zip(chunks, ends, strict=True)):
            if end - last == 1 and chunk.sequence.want == "next":
                fetch.chosen[index] = chunk.sequence.choice is not None
                if not fetch.chosen[index]:
                    plain.append(index)
            last = end
        if any(fetch.chosen):
            fetch.tokens = self._fetch_tokens(likeliest(rows) if tokens is None else tokens)
        self._fetch_rows(fetch, plain)
        if rows.is_cuda:
            event: Any = torch.cuda.Event
            fetch.arrived = event()
            fetch.arrived.record()
        return fetch

    def _fetch_tokens(self, tokens: Tensor) -> Tensor:
        if len(self._tokens) < len(tokens):
            self._tokens = torch.empty_like(tokens, device="cpu", pin_memory=tokens.is_cuda)
        return self._tokens[: len(tokens)].copy_(tokens, non_blocking=True)

    def _fetch_rows(self, fetch: Fetch, chunks: Items[int]) -> None:
        """Begins to copy the rows of these chunks, one each, as far as memory is kept for it."""
        width = fetch.rows.shape[1]
        chunks = chunks[: MOST_PINNED // (4 * width)]
        if len(self._rows) < len(chunks) * width:
            self._rows = torch.empty(len(chunks) * width, pin_memory=fetch.rows.is_cuda)
        for place, index in enumerate(chunks):
            row = fetch.ends[index] - 1
            view = self._rows[place * width : (place + 1) * width].view(1, width)
            fetch.views[index] = view.copy_(fetch.rows[row : row + 1], non_blocking=True)
