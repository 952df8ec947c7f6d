"""`greenroom bench-kernels`: parses, measures, prints; see `greenroom.bench.kernels`."""

import dataclasses
from typing import Annotated

import typer

from greenroom import native
from greenroom.bench import kernels
from greenroom.errors import RequestError


def bench_kernels(
    quick: Annotated[bool, typer.Option(help="Three formats, best tier, ten seconds.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="Default: all.")] = None,
    formats: Annotated[str | None, typer.Option(help="Comma-separated, e.g. MXFP4,Q4_K.")] = None,
    tiers: Annotated[str | None, typer.Option(help="Comma-separated, e.g. avx2,avx512.")] = None,
) -> None:
    """Measure the CPU kernels against the memory's and the processor's limits."""
    count = threads or int(native.lib().default_threads()["threads"])
    plan = kernels.quick_plan(count) if quick else kernels.full_plan(count)
    if formats is not None:
        plan = dataclasses.replace(plan, formats=_chosen("formats", formats, kernels.FORMATS))
    if tiers is not None:
        plan = dataclasses.replace(plan, tiers=_chosen("tiers", tiers, native.usable_tiers()))
    kernels.run(plan, lambda line: print(line, flush=True))


def _chosen(field: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise RequestError(f"--{field}: {unknown[0]} is not one of {', '.join(known)}", field)
    return names
