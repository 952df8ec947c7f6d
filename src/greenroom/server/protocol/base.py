"""The base of every request body, and the types that several APIs share.

It knows JSON and limits; what the fields mean is decided in `routes`.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

T = TypeVar("T")
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1000
MAX_LOGIT_BIAS = 1024
MAX_TOP_LOGPROBS = 20
MAX_TOOLS = 256
MAX_MESSAGES = 4096
MAX_TOKEN_IDS = 1 << 20  # of one prompt; its context is what really limits it
MAX_TEXTS = 4096  # that are read; how many may be asked at once is a setting


class Strict(BaseModel):
    """A request body or a part of one: unknown fields, NaN and infinities are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


# A list that is read up to its first wrong item: a finding for each of a hundred thousand would
# take a second to write.
Several = Annotated[list[T], Field(fail_fast=True)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Stop = StopString | Annotated[Several[StopString], Field(max_length=MAX_STOP_STRINGS)]
LogitBias = Annotated[dict[str, float], Field(max_length=MAX_LOGIT_BIAS)]
TokenIds = Annotated[
    Several[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, max_length=MAX_TOKEN_IDS)
]
Temperature = Annotated[float, Field(ge=0, le=100)]
Probability = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
RepetitionPenalty = Annotated[float, Field(gt=0, le=10)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
TopLogprobs = Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)]
TopK = Annotated[int, Field(ge=-1, lt=2**31)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=512)]
JsonObject = dict[str, Any]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


def stop_strings(stop: str | list[str] | None) -> tuple[str, ...]:
    """The stop strings as a tuple, whichever of the three forms the client used."""
    if stop is None:
        return ()
    return (stop,) if isinstance(stop, str) else tuple(stop)
