"""One request as the scheduler and the cache see it: its tokens, how far they are computed and
which blocks hold them. Does not know what the results are for.
"""

import hashlib
from array import array
from collections.abc import Sequence as Tokens
from typing import Literal

from greenroom.layers.choice import Choice

# What the model's outputs are wanted for: the logits after the last token, the logits of
# every token, or the final hidden state of every token.
Want = Literal["next", "all", "hidden"]


class Sequence:
    """Tokens of one request, prompt first, and their state in the cache.

    Args:
        tokens: the prompt, at least one token.
        groups: number of KV groups of the model.
        want: which outputs the request needs.
        reuse: whether blocks of earlier requests may stand in for a part of the prompt;
            outputs of such tokens are not computed again.
        chunk_limit: most tokens to compute in one step, of all sequences that have a limit
            together; None for no limit of its own.
    """

    __slots__ = (
        "blocks",
        "choice",
        "chunk_limit",
        "computed",
        "delivered",
        "digests",
        "kept_from",
        "prompt_length",
        "reuse",
        "reused",
        "row",
        "tokens",
        "want",
    )

    def __init__(
        self,
        tokens: Tokens[int],
        groups: int,
        want: Want = "next",
        *,
        reuse: bool = True,
        chunk_limit: int | None = None,
    ) -> None:
        self.tokens = list(tokens)
        self.prompt_length = len(self.tokens)
        self.want: Want = want
        self.reuse = reuse
        self.chunk_limit = chunk_limit
        self.choice: Choice | None = None  # how the next token follows from the logits alone
        self.computed = 0  # positions whose keys and values are in the cache
        self.delivered = 0  # positions whose outputs were handed out ("all" and "hidden")
        self.reused = 0  # of these, how many came from earlier requests at first admission
        self.blocks: list[list[int]] = [[] for _ in range(groups)]  # -1: left the window
        self.kept_from = [0] * groups  # first block of each group that is still held
        self.digests: list[bytes] = []  # of full blocks, chained from the start
        self.row = -1  # row in the block tables while admitted

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def remaining(self) -> int:
        """Tokens not yet computed; 1 while decoding."""
        return len(self.tokens) - self.computed

    def digest(self, index: int, block_size: int) -> bytes:
        """Identifies block `index` and everything before it; the block must be full."""
        while len(self.digests) <= index:
            start = len(self.digests) * block_size
            content = array("q", self.tokens[start : start + block_size]).tobytes()
            parent = self.digests[-1] if self.digests else b""
            self.digests.append(hashlib.blake2b(parent + content, digest_size=16).digest())
        return self.digests[index]
