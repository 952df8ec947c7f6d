"""How well a model predicts a text, and how far one way of running it is from another.

Logits come window by window from an engine and are reduced at once; the reference's are kept in
a temporary file, so memory does not grow with the text. Knows engines, not placements.
"""

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Full, Queue
from threading import Event
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from greenroom.errors import BudgetError, RequestError
from greenroom.placement.budget import mib

if TYPE_CHECKING:
    from greenroom.engine import LLM

Rows = NDArray[np.float32]
Floats = NDArray[np.float64]
Progress = Callable[[int, int], None]  # positions done, positions of all

_ELEMENTS = 1 << 22  # logits reduced at once: 32 MiB in float64
_WAIT = 0.2  # seconds


@dataclass(frozen=True, slots=True)
class Windows:
    """A text cut into pieces that are scored each on its own.

    Attributes:
        tokens: ids of each window, at least two.
        context: most tokens of a window.
    """

    tokens: tuple[tuple[int, ...], ...]
    context: int

    @property
    def positions(self) -> int:
        """Predicted tokens: all but the first of each window."""
        return sum(len(window) - 1 for window in self.tokens)


def cut(tokens: Sequence[int], context: int, limit: int, first: Sequence[int] = ()) -> Windows:
    """Windows of `context` tokens that do not overlap.

    Args:
        tokens: ids of the text, without special tokens.
        context: most tokens of a window, `first` included; at least 2.
        limit: most tokens of the text to use.
        first: what the tokenizer puts before a text, such as its beginning-of-text token.

    Raises:
        RequestError: there is nothing to predict.
    """
    if context < 2 + len(first):
        raise RequestError(f"a context of {context} is too short; give at least 16", "context")
    step = context - len(first)
    used = tokens[:limit]
    windows = [(*first, *used[i : i + step]) for i in range(0, len(used), step)]
    kept = tuple(window for window in windows if len(window) >= 2)
    if not kept:
        raise RequestError("the text is too short: nothing in it can be predicted", "text")
    return Windows(kept, context)


def windows_of(tokenizer: Any, text: str, context: int, limit: int) -> Windows:
    """`cut` of a text; each window begins as the tokenizer begins a text."""
    first = [t for t in tokenizer.encode("", add_special=True) if t == tokenizer.bos_id]
    return cut(tokenizer.encode(text), context, limit, first)


def log_softmax(logits: Rows) -> Floats:
    """Log-probabilities, float64, of (rows, vocabulary) logits."""
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    x -= np.log(np.exp(x).sum(-1, keepdims=True))
    return x


@dataclass(slots=True)
class Scores:
    """One number per predicted position, in order; the last three only against a reference.

    Attributes:
        nll: negative log-likelihood of the text's token, nats.
        kl: divergence of these probabilities from the reference's, KL(reference || this), nats.
        agree: whether both have the same likeliest token.
        gap: largest distance of a logit from the reference's.
    """

    nll: list[Floats] = field(default_factory=list)
    kl: list[Floats] = field(default_factory=list)
    agree: list[NDArray[np.bool_]] = field(default_factory=list)
    gap: list[Floats] = field(default_factory=list)

    def add(self, logits: Rows, targets: NDArray[np.int64], reference: Rows | None) -> None:
        """Takes positions' logits (rows, vocabulary), true tokens (rows,) and the reference."""
        step = max(1, _ELEMENTS // logits.shape[1])
        for i in range(0, len(logits), step):
            part = logits[i : i + step]
            other = None if reference is None else reference[i : i + step]
            self._add(part, targets[i : i + step], other)

    def _add(self, logits: Rows, targets: NDArray[np.int64], reference: Rows | None) -> None:
        q = log_softmax(logits)
        self.nll.append(-q[np.arange(len(q)), targets])
        if reference is None:
            return
        p = log_softmax(reference)
        self.kl.append((np.exp(p) * (p - q)).sum(-1).clip(0))  # rounding may go below 0
        self.agree.append(logits.argmax(-1) == reference.argmax(-1))
        self.gap.append(np.abs(logits - reference).max(-1).astype(np.float64))

    def summary(self, base: Floats | None = None) -> dict[str, Any]:
        """Figures for people and machines.

        Args:
            base: the reference's negative log-likelihoods of the same positions, if any.
        """
        nll = np.concatenate(self.nll)
        mean, error = mean_error(nll)
        found: dict[str, Any] = {
            "positions": len(nll),
            "perplexity": math.exp(mean),
            "perplexity_error": math.exp(mean) * error,
        }
        if base is None or not self.kl:
            return found
        kl, agree = np.concatenate(self.kl), np.concatenate(self.agree)
        ratio, ratio_error = mean_error(nll - base)
        kl_mean, kl_error = mean_error(kl)
        share, share_error = mean_error(agree.astype(np.float64))
        return found | {
            "perplexity_ratio": math.exp(ratio),
            "perplexity_ratio_error": math.exp(ratio) * ratio_error,
            "kl_mean": kl_mean,
            "kl_mean_error": kl_error,
            "kl_median": float(np.median(kl)),
            "kl_99": float(np.quantile(kl, 0.99)),
            "kl_max": float(kl.max()),
            "top1_agreement": share,
            "top1_agreement_error": share_error,
            "largest_logit_difference": float(np.concatenate(self.gap).max()),
        }


def mean_error(values: Floats) -> tuple[float, float]:
    """Mean and its standard error, positions taken as independent (as llama.cpp does)."""
    if len(values) < 2:
        return float(values.mean()), 0.0
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def scored(llm: "LLM", tokens: Sequence[int]) -> Iterator[Rows]:
    """Logits after each token, in pieces (rows, vocabulary) float32; at most three are alive."""
    results: Queue[Any] = Queue(maxsize=1)
    gone = Event()

    def sink(item: object) -> None:
        while not gone.is_set():  # the engine waits here until there is room
            try:
                results.put(item, timeout=_WAIT)
            except Full:
                continue
            return

    job = llm.engine.start_scoring(list(tokens), sink)
    try:
        while (item := results.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        gone.set()
        llm.engine.cancel(job)


class Spool:
    """The reference's logits of all positions in a file without a name.

    Args:
        windows: what is scored.
        vocabulary: logits of a position.

    Raises:
        BudgetError: the folder for temporary files has too little room.
    """

    def __init__(self, windows: Windows, vocabulary: int) -> None:
        need = windows.positions * vocabulary * 4
        folder = tempfile.gettempdir()
        free = shutil.disk_usage(folder).free
        if need > free:
            raise BudgetError(
                f"{folder}: the reference's logits need {mib(need)}, but only "
                f"{free >> 20} MiB are free; lower --max-tokens or set TMPDIR"
            )
        self._file = tempfile.TemporaryFile(prefix="greenroom-eval-")  # noqa: SIM115
        self._shape = (windows.positions, vocabulary)

    def write(self, logits: Rows) -> None:
        """Appends positions."""
        np.ascontiguousarray(logits).tofile(self._file)

    def read(self, start: int, stop: int) -> Rows:
        """Positions from `start` to `stop`: (stop - start, vocabulary) float32."""
        width = self._shape[1]
        self._file.seek(start * width * 4)
        return np.fromfile(self._file, np.float32, (stop - start) * width).reshape(-1, width)

    def close(self) -> None:
        """Gives the disk space back."""
        self._file.close()


def evaluate(
    llm: "LLM",
    windows: Windows,
    reference: Spool | None = None,
    keep: Spool | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Scores every window.

    Args:
        llm: what is measured; its context is at least `windows.context`.
        windows: the text.
        reference: what it is compared with, or None.
        keep: where its logits are kept, or None.
        progress: told how far it is.
    """
    scores, at = Scores(), 0
    for window in windows.tokens:
        row = 0
        for part in scored(llm, window):
            logits = part[: len(window) - 1 - row]  # what follows the last token is not known
            targets = np.array(window[row + 1 : row + 1 + len(logits)], np.int64)
            row += len(part)
            if not len(logits):
                continue
            if keep is not None:
                keep.write(logits)
            known = None if reference is None else reference.read(at, at + len(logits))
            scores.add(logits, targets, known)
            at += len(logits)
            if progress is not None:
                progress(at, windows.positions)
    return scores


def read_text(path: Path) -> str:
    """A UTF-8 text file; RequestError if it is none or empty, OSError if it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: not UTF-8 text (byte {error.start})", "text") from None
    if not text.strip():
        raise RequestError(f"{path}: the file holds no text", "text")
    return text
