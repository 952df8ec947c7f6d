"""The progress bar of commands that write or fetch many bytes; silent where nobody watches.
Also what such commands say of a run that was stopped and of one that goes on.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


@contextmanager
def bytes_progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """Shows (bytes done, bytes of all) on standard error until the block is left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    quiet = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=quiet) as bars:
        task = bars.add_task(title, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


@contextmanager
def count_progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """Shows (done, all) of anything that is counted, as above."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bars:
        task = bars.add_task(title, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


@contextmanager
def resumable(out: Path) -> Iterator[Callable[[int, int], None]]:
    """`bytes_progress` of a file whose writing goes on when the command is run again."""
    from greenroom.gguf.partial import partial_path

    try:
        with bytes_progress(f"writing {out.name}") as progress:
            yield progress
    except KeyboardInterrupt:
        partial = partial_path(out)
        if partial.exists():
            _say(
                f"{partial} keeps what is there; run the same command again to go on, or delete it"
            )
        raise


def say_resumed(found: int) -> None:
    """Says that `found` bytes were there already, if any were."""
    if found:
        _say(f"went on behind {found / 2**30:.2f} GiB of an earlier run")


def _say(text: str) -> None:
    Console(stderr=True, soft_wrap=True).print(text, markup=False, highlight=False)
