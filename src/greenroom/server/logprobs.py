"""Log-probabilities in the shapes of OpenAI's two APIs and Ollama's."""

from collections.abc import Sequence
from typing import Any

from greenroom.engine.output import TokenLogprob, TokenOutput


def token_name(tokenizer: Any, token: int) -> str:
    """A token's text; `bytes:\\xe2\\x80` where its bytes alone are no text."""
    data: bytes = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _entry(tokenizer: Any, token: int, logprob: float) -> dict[str, Any]:
    data: bytes = tokenizer.token_bytes(token)
    text = data.decode("utf-8", "replace")
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(data)}


def chat_logprobs(tokenizer: Any, tokens: Sequence[TokenOutput]) -> list[dict[str, Any]]:
    """`choices[].logprobs.content` of chat completions, also what Ollama and responses use."""
    found = []
    for output in tokens:
        entry = _entry(tokenizer, output.token_id, output.logprob or 0.0)
        top = [_entry(tokenizer, token, logprob) for token, logprob in output.top_logprobs]
        found.append({**entry, "top_logprobs": top})
    return found


def completion_logprobs(
    tokenizer: Any,
    rows: Sequence[tuple[int, TokenLogprob | None]],
    offset: int = 0,
) -> dict[str, Any]:
    """`choices[].logprobs` of completions.

    Args:
        tokenizer: the model's.
        rows: token id and its log-probability; None for the first token of a prompt.
        offset: characters before the first row.
    """
    tokens, values, tops, offsets = [], [], [], []
    for token, found in rows:
        name = token_name(tokenizer, token)
        tokens.append(name)
        offsets.append(offset)
        offset += len(name)
        values.append(found and max(found.logprob, -9999.0))
        tops.append(found and _top(tokenizer, token, found))
    return {
        "tokens": tokens,
        "token_logprobs": values,
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def _top(tokenizer: Any, token: int, found: TokenLogprob) -> dict[str, float]:
    """The likeliest tokens by name, and always the one that was taken."""
    top: dict[str, float] = {}
    for other, logprob in (*found.top, (token, found.logprob)):
        top.setdefault(token_name(tokenizer, other), max(logprob, -9999.0))
    return top
