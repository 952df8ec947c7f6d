"""However an answer ends, text that was held back for a stop string that did not come is given
out, and a stop string that did come is not."""

import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from greenroom.engine import SamplingParams
from greenroom.engine.output import TextStream

from .fake_model import FakeDecoder, FakeTokenizer, fake_engine

TOKENIZER = FakeTokenizer()


class Dictated:
    """A grammar that allows one token at a time."""

    def __init__(self, tokens: list[int], finite: bool) -> None:
        self.tokens, self.finite, self.at = tokens, finite, 0

    def mask(self) -> Any:
        return np.arange(97) == self.tokens[self.at]

    def accept(self, token_id: int) -> None:
        self.at += 1

    def finished(self) -> bool:
        return self.finite and self.at == len(self.tokens)


def said(tokens: list[int], ending: str, **settings: Any) -> tuple[str, str]:
    """Text and finish reason of an answer of these tokens."""
    outputs: list[Any] = []
    done = threading.Event()

    def sink(output: Any) -> None:
        outputs.append(output)
        if isinstance(output, Exception) or output.finish_reason:
            done.set()

    if ending == "end token":
        tokens = [*tokens, TOKENIZER.eos_id]
    limit = len(tokens) if ending == "length" else None
    engine = fake_engine()
    try:
        params = SamplingParams(temperature=0, max_tokens=limit, **settings)
        engine.start([1, 2], params, Dictated(tokens, ending == "grammar"), sink)
        assert done.wait(10)
    finally:
        engine.close()
    assert not any(output.finish_reason for output in outputs[:-1])
    return "".join(output.text for output in outputs), outputs[-1].finish_reason


ENDINGS = [("length", "length"), ("end token", "stop"), ("grammar", "stop")]
HELLO = TOKENIZER.encode("HELLO")


@pytest.mark.parametrize(("ending", "reason"), ENDINGS)
@pytest.mark.parametrize("stop", ["O!", "HELLO?", ("LO, YOU", "ELLO, I"), "é"])
def test_what_was_held_back_comes_at_the_end(
    ending: str, reason: str, stop: str | tuple[str, ...]
) -> None:
    assert said(HELLO, ending, stop=stop) == ("HELLO", reason)


@pytest.mark.parametrize(("ending", "reason"), ENDINGS)
def test_half_a_character_at_the_end_is_shown_as_such(ending: str, reason: str) -> None:
    assert said([*HELLO, 90], ending, stop=("O\ufffd!",)) == ("HELLO\ufffd", reason)


@pytest.mark.parametrize(("ending", "_"), ENDINGS)
def test_a_stop_string_that_only_the_last_bytes_complete_is_not_text(ending: str, _: str) -> None:
    assert said([*HELLO, 90], ending, stop="LO\ufffd") == ("HEL", "stop")


@pytest.mark.parametrize("ending", ["length", "grammar"])
def test_a_stop_string_in_the_last_token_is_not_text(ending: str) -> None:
    assert said(HELLO, ending, stop="LO") == ("HEL", "stop")


texts = st.text("AB", max_size=12)
STOPS = st.lists(st.text("AB", min_size=1, max_size=4), max_size=3)


@settings(max_examples=300, deadline=None)
@given(texts, STOPS)
def test_text_is_all_there_is_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    stream = TextStream(FakeDecoder(TOKENIZER), stops)
    given_out, stopped = "", False
    for token in TOKENIZER.encode(text):
        piece, stopped = stream.push(token)
        given_out += piece
        if stopped:
            break
    else:
        rest, stopped = stream.finish()
        given_out += rest
    # Whichever stop string is complete first ends the answer; of those complete with the same
    # character the one that began first.
    ends = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    assert stopped == bool(ends)
    assert given_out == (text[: min(ends)[1]] if ends else text)
