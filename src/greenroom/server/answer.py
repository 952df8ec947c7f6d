"""An answer as a list of blocks: reasoning, content, tool calls, in the order they came.

Every API writes the same blocks in its own words.
"""

import uuid
from dataclasses import dataclass, field

from greenroom.engine.output import TokenOutput
from greenroom.server.generation import Generation
from greenroom.server.reading import Delta, Kind, Piece


def new_id(prefix: str) -> str:
    """A random identifier such as `call_5f0c...`."""
    return f"{prefix}{uuid.uuid4().hex[:24]}"


@dataclass(slots=True)
class Block:
    """A run of text of one kind, or one tool call with its JSON arguments as text."""

    kind: Kind
    call: int = 0
    name: str = ""
    text: str = ""
    id: str = field(default_factory=lambda: new_id(""))


@dataclass(slots=True)
class Answer:
    """One choice so far."""

    blocks: list[Block] = field(default_factory=list)
    tokens: list[TokenOutput] = field(default_factory=list)  # of the content, with logprobs
    outputs: list[TokenOutput] = field(default_factory=list)  # all
    finish_reason: str | None = None
    stopped_by: str | None = None

    def add(self, piece: Piece) -> list[tuple[Block, Delta, bool]]:
        """Takes in a piece; returns each delta's block and whether the delta opened it."""
        self.tokens += piece.tokens
        self.outputs.append(piece.output)
        self.finish_reason = piece.finish_reason
        self.stopped_by = piece.stopped_by
        return [self._place(delta) for delta in piece.deltas]

    def _place(self, delta: Delta) -> tuple[Block, Delta, bool]:
        last = self.blocks[-1] if self.blocks else None
        opens = last is None or last.kind != delta.kind or last.call != delta.call
        if opens:
            self.blocks.append(Block(delta.kind, delta.call, delta.name or ""))
        self.blocks[-1].text += delta.text
        return self.blocks[-1], delta, opens

    def text(self, kind: Kind) -> str:
        """All text of a kind."""
        return "".join(block.text for block in self.blocks if block.kind == kind)

    @property
    def calls(self) -> list[Block]:
        """The tool calls."""
        return [block for block in self.blocks if block.kind == "tool_call"]


async def collect(generation: Generation) -> list[Answer]:
    """All choices, complete."""
    answers = [Answer() for _ in generation.choices]
    async for piece in generation.pieces():
        answers[piece.choice].add(piece)
    return answers
