"""`greenroom sweep`: speed against VRAM, one budget after another."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from greenroom.commands import options

if TYPE_CHECKING:
    from greenroom.bench.sweep import Memory

Budgets = Annotated[
    str,
    Option(
        help="Budgets, the one to compare with first.",
        show_default="max, then 16GiB and less down to 0",
    ),
]
Context = Annotated[int, Option(help="Context in tokens.", min=1)]
Prompt = Annotated[int, Option(help="Tokens of the prompt.", min=1)]
Generate = Annotated[int, Option(help="Tokens generated.", min=2)]
Runs = Annotated[int, Option(help="Timed runs per budget.", min=1, max=1000)]
Report = Annotated[Path | None, Option(help="Folder for sweep.md, sweep.json and a plot.")]

_BUDGETS = "max,16GiB,12GiB,8GiB,6GiB,4GiB,3GiB,2GiB,1GiB,0.5GiB,0.25GiB,0"


def sweep(
    model: options.Model,
    vram: Budgets = _BUDGETS,
    context: Context = 4096,
    prompt: Prompt = 16,
    generate: Generate = 48,
    runs: Runs = 5,
    threads: options.Threads = None,
    report: Report = None,
) -> None:
    """Measure a model under every budget of VRAM: speed, peak, hits, and what is saved.

    The first budget is what the others are compared with. The last line of standard output is
    JSON.
    """
    from greenroom.bench import sweep as bench
    from greenroom.bench.speed import command_line
    from greenroom.bench.workloads import Case
    from greenroom.commands.console import errors
    from greenroom.placement.gpus import gpu_facts

    case = Case(prompt, 1, generate)
    one: dict[str, Any] = {"max_sequences": 1, "prefix_cache": False}
    settings = one | {"context_length": context, "threads": threads}
    budgets = _budgets(vram)
    document = {
        "kind": bench.KIND, "version": bench.VERSION, "model": model.name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "command": command_line(),
        "gpus": [gpu.name for gpu in gpu_facts()[0]], "runs": runs, "case": case.name,
        "context": context,
    }  # fmt: skip
    points = []
    with errors.status("measuring") as status:
        how = _opener(model, settings), status.update, _placed(model, settings)
        for point in bench.measure(budgets, case, runs, *how):
            points.append(point)
            if report is not None:  # a sweep that is stopped keeps what it has
                bench.write_report(document, points, report)
    _show(bench.HEAD, bench.rows(points))
    print(json.dumps({**document, "points": [asdict(point) for point in points]}), flush=True)


def _budgets(text: str) -> list[str]:
    """The budgets to measure; without a GPU there is but one."""
    import torch

    from greenroom.commands.console import errors
    from greenroom.placement.budget import parse_size

    budgets = [budget.strip() for budget in text.split(",")]
    for budget in budgets:
        parse_size(budget, "vram")
    if torch.cuda.is_available():
        return budgets
    errors.print("PyTorch finds no CUDA GPU: the CPU alone is measured")
    return ["0"]


def _show(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*head, box=None, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)


def _placed(model: Path, settings: dict[str, Any]) -> Any:
    """What goes where under a budget; the budget itself where it is refused."""
    from dataclasses import replace

    import torch

    from greenroom.engine.llm import plan
    from greenroom.errors import BudgetError

    def placed(budget: str) -> Any:
        vram = budget if torch.cuda.is_available() else None
        try:
            return replace(plan(model, vram=vram, **settings), reason="", vram=None)
        except BudgetError:
            return budget

    return placed


def _opener(model: Path, settings: dict[str, Any]) -> Any:
    """Opens the model under one budget after another in this process."""
    import gc

    import torch

    from greenroom.bench.sweep import Memory
    from greenroom.engine import LLM, EngineConfig
    from greenroom.engine.load import load_engine
    from greenroom.experts.shelf import Shelf

    shelf = Shelf()
    cuda: Any = torch.cuda
    there, left = cuda.is_available(), 0  # what libraries keep from one engine to the next

    def taken() -> "Memory":
        if not there:
            return Memory()
        free, total = cuda.mem_get_info()
        peak, driver = cuda.max_memory_reserved(), total - free - cuda.memory_reserved()
        return Memory(0 if peak == left else peak, driver)

    def opened(budget: str) -> tuple[Any, Callable[[], "Memory"]]:
        nonlocal left
        gc.collect()
        if there:
            cuda.empty_cache()
            cuda.reset_peak_memory_stats()
            left = cuda.memory_reserved()
        config = EngineConfig(vram=budget if there else None, **settings)
        return LLM.from_engine(load_engine(model, config, None, shelf)), taken

    return opened
