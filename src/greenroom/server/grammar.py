"""Grammars that hold an answer to a form: JSON schema, regular expression, Lark, GBNF.

llguidance compiles them and says after each token which tokens may follow. Knows the
vocabulary and the engine's `Constraint`, nothing of requests.
"""

import json
import threading
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from greenroom.errors import RequestError

GrammarKind = Literal["json_schema", "regex", "lark", "gbnf"]
MAX_DEPTH = 64
_WORD = 32
# Work of one mask. llguidance's own limits let an expression such as (a{999}){999} hold up the
# step of everybody for 0.6 s; these for 25 ms, and refuse none of the ordinary ones.
_FIRST_FUEL, _STEP_FUEL = 100_000, 50_000
_SPACE = r"[\x20\x0A]{0,32}"  # bounded: small models like to indent for ever


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """A grammar as the client sent it, and the request field it came in."""

    kind: GrammarKind
    text: str
    field: str


def json_grammar(schema: dict[str, Any] | None, field: str) -> GrammarSpec:
    """A grammar for JSON values of a schema; None means any object.

    Raises:
        RequestError: the schema is nested deeper than `MAX_DEPTH`.
    """
    if schema is None:
        schema = {"type": "object"}
    if _depth(schema) > MAX_DEPTH:
        raise RequestError(f"{field}: the schema is nested deeper than {MAX_DEPTH} levels", field)
    return GrammarSpec("json_schema", json.dumps(schema), field)


def _depth(value: Any) -> int:
    deepest, level = 0, [value]
    while level and deepest <= MAX_DEPTH:
        deepest += 1
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner += item.values()
            elif isinstance(item, list):
                inner += item
        level = inner
    return deepest


class Vocabulary(Protocol):
    """What grammars need of a tokenizer."""

    bos_id: int | None
    eos_id: int | None
    eog_ids: frozenset[int]

    @property
    def vocabulary_size(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def token_bytes(self, token: int) -> bytes: ...

    def is_special(self, token: int) -> bool: ...


class _Wrapped:
    """A tokenizer in the form that llguidance's TokenizerWrapper asks for."""

    def __init__(self, tokenizer: Vocabulary) -> None:
        size = tokenizer.vocabulary_size
        self._encode = tokenizer.encode
        self.bos_token_id = tokenizer.bos_id
        self.eos_token_id = min(tokenizer.eog_ids) if tokenizer.eos_id is None else tokenizer.eos_id
        self.tokens = [tokenizer.token_bytes(token) for token in range(size)]
        self.special_token_ids = [t for t in range(size) if tokenizer.is_special(t)]

    def __call__(self, text: str) -> list[int]:
        if not isinstance(text, str):  # asked once with bytes, to learn what we accept
            raise TypeError("text only")
        return self._encode(text)


class GrammarConstraint:
    """One answer's way through a grammar; an engine `Constraint`.

    Args:
        matcher: an llguidance matcher at its start.
        vocabulary_size: length of the mask; ids the tokenizer does not have are never allowed.
        end_ids: tokens that end an answer, all allowed where the grammar allows an end.
        spec: what the matcher was made of.
    """

    def __init__(
        self, matcher: Any, vocabulary_size: int, end_ids: frozenset[int], spec: GrammarSpec
    ) -> None:
        self._matcher, self._spec = matcher, spec
        self._size = vocabulary_size
        self._end_ids = np.fromiter(end_ids, dtype=np.int64)
        self._bits = np.zeros(-(-vocabulary_size // _WORD), dtype=np.int32)

    def copy(self) -> "GrammarConstraint":
        """Another one at the same place, for an answer of its own."""
        ends = frozenset(int(token) for token in self._end_ids)
        return GrammarConstraint(self._matcher.deep_copy(), self._size, ends, self._spec)

    def mask(self) -> NDArray[np.bool_]:
        """(vocabulary,) bool, True where the token keeps to the grammar.

        Raises:
            RequestError: the grammar asks for more work than one step may have.
        """
        if self._matcher.is_stopped():
            allowed = np.zeros(self._size, dtype=np.bool_)
            allowed[self._end_ids] = True
            return allowed
        self._bits.fill(0)
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._check()
        bits = np.unpackbits(self._bits.view(np.uint8), bitorder="little")
        allowed = bits[: self._size].astype(np.bool_)
        allowed[self._end_ids] = self._matcher.is_accepting()
        return allowed

    def accept(self, token_id: int) -> None:
        """Moves on by one token.

        Raises:
            RequestError: as `mask` does.
        """
        if not self._matcher.is_stopped() and token_id not in self._end_ids:
            self._matcher.consume_token(token_id)
            self._check()

    def _check(self) -> None:
        """A matcher that gives up says that it is stopped, as at the end of an answer."""
        if self._matcher.is_error():
            raise _refused(self._spec, self._matcher.get_error())

    def finished(self) -> bool:
        """Whether nothing can follow."""
        return bool(self._matcher.is_stopped())


class GrammarCompiler:
    """Compiles grammars for one vocabulary. Slow (up to seconds): call it in a worker.

    Args:
        tokenizer: the model's.
        vocabulary_size: columns of the model's logits, if more than the tokenizer's tokens.
    """

    def __init__(self, tokenizer: Vocabulary, vocabulary_size: int | None = None) -> None:
        self._tokenizer = tokenizer
        self._size = max(vocabulary_size or 0, tokenizer.vocabulary_size)
        self._lock = threading.Lock()
        self._prepared: Any = None

    def prepare(self) -> None:
        """Makes what the first grammar needs. A vocabulary of 200,000 tokens takes a second of
        it, half of that with the interpreter lock held: do it when the model is loaded."""
        self._vocabulary()

    def _vocabulary(self) -> Any:
        """The vocabulary in llguidance's form, made once."""
        import llguidance

        with self._lock:
            if self._prepared is None:
                wrapper = llguidance.TokenizerWrapper(_Wrapped(self._tokenizer))
                self._prepared = llguidance.LLTokenizer(wrapper, n_vocab=self._size)
            return self._prepared

    def compile(self, spec: GrammarSpec) -> GrammarConstraint:
        """A constraint at its start.

        Raises:
            RequestError: the grammar is wrong, too large, or uses what is not supported.
        """
        import llguidance

        limits = llguidance.LLParserLimits(
            max_grammar_size=100_000,
            initial_lexer_fuel=_FIRST_FUEL,
            step_lexer_fuel=_STEP_FUEL,
            verbose_errors=False,
        )
        try:
            # No log: it would write what clients send to standard error.
            matcher = llguidance.LLMatcher(
                self._vocabulary(), _grammar(spec), log_level=0, limits=limits
            )
        except ValueError as error:
            raise _refused(spec, str(error)) from None
        if matcher.is_error():
            raise _refused(spec, matcher.get_error())
        constraint = GrammarConstraint(matcher, self._size, self._tokenizer.eog_ids, spec)
        constraint.mask()  # the costliest one, and where a grammar beyond the limits fails
        return constraint


def _grammar(spec: GrammarSpec) -> str:
    import llguidance

    if spec.kind == "json_schema":
        matcher: Any = llguidance.LLMatcher
        options = {"whitespace_pattern": _SPACE}
        return str(matcher.grammar_from_json_schema(spec.text, defaults=options))
    return str(llguidance.grammar_from(spec.kind, spec.text))


def _refused(spec: GrammarSpec, reason: str) -> RequestError:
    first = reason.strip().splitlines()[0] if reason.strip() else "it cannot be compiled"
    return RequestError(f"{spec.field}: {first[:300]}", spec.field)
