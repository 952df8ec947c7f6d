"""Brings what a step left on its device to the host: tokens where they can be chosen there, rows
of logits or states where somebody wants to see them. Knows neither models nor requests.
"""

import logging
from collections.abc import Sequence as Items
from contextlib import suppress
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from greenroom.engine.scheduler import Chunk
from greenroom.layers.choice import UNDECIDED, Choice, choose, likeliest, numbers
from greenroom.layers.staging import Staging

log = logging.getLogger(__name__)

Rows = NDArray[np.float32]  # (rows, vocabulary) logits or (rows, hidden) states
Found = Rows | int  # or the token that was chosen on the device

MOST_PINNED = 32 << 20  # bytes of rows that are fetched through memory kept for it


class Fetch:
    """One step's results on their way.

    Attributes:
        rows: (rows, width) float32, of all chunks, where they were computed.
        ends: row behind each chunk's.
        tokens: (rows,) int64 in RAM, chosen ones; None if there are none.
        chosen: for each chunk, whether its token is chosen where the rows are.
        there: (rows,) int64, the tokens where the rows are, if `rows` outlast the next step and
            every chunk has one token that is chosen; else None.
        views: for each chunk, its rows in RAM if they are fetched, or None.
        arrived: when tokens and views are there.
        undecided: whether `take` found a token that only the host can choose.
    """

    def __init__(self, rows: Tensor, ends: Items[int]) -> None:
        self.rows, self.ends = rows, ends
        self.tokens: Tensor | None = None
        self.chosen: list[bool] = [False] * len(ends)
        self.there: Tensor | None = None
        self.undecided = False
        self.views: list[Tensor | None] = [None] * len(ends)
        self.arrived: Any = None

    def take(self) -> list[Found]:
        """Waits; the token or the rows of each chunk. Rows of a sequence that only wants the
        next token are overwritten by the next step, unless they are kept."""
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
                self.undecided |= self.chosen[index]
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
        self._numbers: Staging | None = None  # of the choices, on their way
        self._draws = True

    def begin(
        self,
        rows: Tensor,
        tokens: Tensor | None,
        chunks: Items[Chunk],
        ends: Items[int],
        keep: bool = False,
    ) -> Fetch:
        """Begins to fetch; returns before the device is done.

        Args:
            rows: (rows, width) float32, of all chunks; they stay until the next step.
            tokens: (rows,) int64, the likeliest of each row, if that is known already.
            chunks: of the step.
            ends: row behind each chunk's.
            keep: have `Fetch.there` if possible: the next step may begin before `take`.
        """
        fetch = Fetch(rows, ends)
        if not (rows.is_cuda or self._remote):
            return fetch
        singles = [
            (index, end - 1)
            for index, (first, end) in enumerate(pairwise((0, *ends)))
            if end == first + 1 and chunks[index].sequence.want == "next"
        ]
        choices: list[Choice | None] = [None] * rows.shape[0]
        for index, row in singles:
            choices[row] = chunks[index].sequence.choice
        if any(choices):
            tokens = self._choose(rows, tokens, choices)
        for index, row in singles:
            fetch.chosen[index] = choices[row] is not None
        if any(fetch.chosen) and tokens is not None:
            fetch.tokens = self._fetch_tokens(tokens)
            if keep and all(fetch.chosen) and tokens.shape == rows.shape[:1]:
                self._keep(fetch, tokens)
        self._fetch_rows(fetch, [index for index, _ in singles if not fetch.chosen[index]])
        if rows.is_cuda:
            event: Any = torch.cuda.Event
            fetch.arrived = event()
            fetch.arrived.record()
        return fetch

    def _keep(self, fetch: Fetch, tokens: Tensor) -> None:
        """Copies the rows: the host needs those of a token that turns out to be undecided."""
        with suppress(torch.OutOfMemoryError):
            fetch.rows = fetch.rows.clone()
            fetch.there = tokens

    def _choose(
        self, rows: Tensor, likeliest_: Tensor | None, choices: list[Choice | None]
    ) -> Tensor:
        """Has the device choose for rows that have a choice; (rows,) int64 or fewer. Where its
        memory does not suffice for draws, their choices are struck out."""
        drawn = [i for i, c in enumerate(choices) if c is not None and c.temperature > 0]
        if drawn and self._draws:
            try:
                count = max(i for i, choice in enumerate(choices, 1) if choice is not None)
                return self._draw(rows[:count], choices[:count])
            except torch.OutOfMemoryError:
                self._draws = False
                log.info("no VRAM is left to draw tokens there: the CPU does it")
        for row in drawn:
            choices[row] = None
        return likeliest(rows) if likeliest_ is None else likeliest_

    def _draw(self, rows: Tensor, choices: list[Choice | None]) -> Tensor:
        values = torch.tensor(numbers(choices), dtype=torch.float64)
        if self._numbers is None or self._numbers.there[0].shape != values.shape:
            self._numbers = Staging(rows.device, [values])
        else:
            self._numbers.here[0][...] = values.numpy()
            self._numbers.send()
        return choose(rows, choices, self._numbers.there[0])

    def _fetch_tokens(self, tokens: Tensor) -> Tensor:
        count = tokens.shape[0]
        if self._tokens.shape[0] < count:
            self._tokens = torch.empty_like(tokens, device="cpu", pin_memory=tokens.is_cuda)
        return self._tokens[:count].copy_(tokens, non_blocking=True)

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
