"""`greenroom plan`: placement, memory and speed of a model, predicted from its header alone."""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from greenroom.commands import options

if TYPE_CHECKING:
    from greenroom.gguf import GGUFFile
    from greenroom.placement.calibrate import MachineProfile

_PROMPT = 512  # tokens of the prompt that prefill is predicted for

Model = Annotated[str, Argument(help="A GGUF file, a shape of 'synth', or hf:owner/repo[:quant].")]
Batch = Annotated[int, Option(help="Sequences decoded at once.", min=1)]
Context = Annotated[int, Option(help="Tokens behind each sequence.", min=1)]
Ram = Annotated[str | None, Option(help="RAM it may take.  [default: what the machine has]")]
MachineFile = Annotated[
    Path | None, Option("--machine", help="What doctor saved (or --json printed) elsewhere.")
]
Sweep = Annotated[bool, Option("--sweep", help="A table over VRAM budgets.")]
Plot = Annotated[Path | None, Option(help="Draw the sweep into this PNG file.")]
Json = Annotated[bool, Option("--json", help="Print one JSON document instead of tables.")]


def plan(
    model: Model,
    vram: options.Vram = None,
    ram: Ram = None,
    context: Context = 4096,
    batch: Batch = 1,
    machine: MachineFile = None,
    sweep: Sweep = False,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Predict what a model needs and how fast it is, before loading or downloading it.

    Only the header is read. Rates are those 'greenroom doctor' measured here, or on the machine
    that FILE is of; predictions are upper bounds, see docs/measuring.md.
    """
    from greenroom.gguf import GGUFFile
    from greenroom.placement.budget import parse_size

    profile = _profile(machine)
    budget = None if vram is None else parse_size(vram, "vram")
    room = profile.ram if ram is None else parse_size(ram, "ram") or profile.ram
    with tempfile.TemporaryDirectory() as folder, GGUFFile(_header(model, Path(folder))) as file:
        wanted = [budget]
        if sweep or plot is not None:
            wanted += [b for b in budgets(profile.vram_total, file.nbytes) if b != budget]
        rows = [predicted(file, profile, b, context, batch) for b in wanted]
        document = _document(file, profile, rows, {"context": context, "batch": batch})
    document |= {"ram": room, "fits_ram": rows[0]["memory"]["ram"] <= room}
    if plot is not None:
        draw(document, plot)
    if as_json:
        print(json.dumps(document, indent=1))
    else:
        _show(document)


def _document(
    file: "GGUFFile", profile: "MachineProfile", rows: list[dict[str, Any]], asked: dict[str, int]
) -> dict[str, Any]:
    return {
        "kind": "plan",
        "version": 1,
        "model": {"name": file.metadata.get("general.name"), "bytes": file.nbytes},
        "machine": {"name": profile.name, "fingerprint": profile.fingerprint},
        "prompt": _PROMPT,
        **asked,
        "plan": rows[0],
        "sweep": sorted(rows, key=lambda row: row["vram"] or 0) if len(rows) > 1 else [],
    }


def _profile(path: Path | None) -> "MachineProfile":
    from greenroom.placement.calibrate import ProfileError, load_profile, saved_profile
    from greenroom.placement.machine import machine

    if path is not None:
        return load_profile(path)
    found = saved_profile(machine().fingerprint)
    if found is None:
        raise ProfileError("this machine was not measured yet; run 'greenroom doctor' first")
    return found


def _header(model: str, folder: Path) -> Path:
    """A file with the model's header; made in `folder` unless the model is a file."""
    from greenroom.convert.synth import Synthesis
    from greenroom.convert.synth_shapes import PUBLISHED, shape_of
    from greenroom.errors import ModelFileError
    from greenroom.gguf.writer import write_header

    if model.startswith("hf:"):
        return _from_hub(model.removeprefix("hf:"), folder)
    path = Path(model)
    if not path.exists() and model.removesuffix("-tiny") in PUBLISHED:
        job = Synthesis(shape_of(model))
        path = folder / f"{model}.gguf"
        write_header(path, job.metadata(), job.specs())
        return path
    if path.suffix != ".gguf" and not path.exists():
        raise ModelFileError(
            f"{model}: no such file or shape; shapes are {', '.join(PUBLISHED)}, each also with "
            "-tiny behind it, and a model on the hub is hf:owner/repo"
        )
    return path


def _from_hub(reference: str, folder: Path) -> Path:
    """Headers of a repository's model, fetched by ranges; its first file's path."""
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.utils._headers import build_hf_headers
    from huggingface_hub.utils._http import get_session

    from greenroom.convert.remote import fetch_header
    from greenroom.server.hub import HubError, choose, parse_reference, remote_models, web_errors

    repo, quant = parse_reference(reference)
    try:
        info = HfApi().model_info(repo, files_metadata=True)
        listed = [(file.rfilename, file.size or 0) for file in info.siblings or ()]
        chosen = choose(remote_models(repo, listed), quant)
        paths = []
        for name in chosen.files:
            paths.append(folder / Path(name).name)
            url = hf_hub_url(repo, name, revision=info.sha)
            fetch_header(get_session(), url, paths[-1], build_hf_headers())
    except web_errors() as error:
        raise HubError(f"{repo}: the hub cannot be read: {error}") from None
    return paths[0]


def budgets(total: int, model: int) -> list[int]:
    """Bytes of VRAM for a sweep: 0, and eighths of what the model could use; none without a GPU."""
    most = min(total, model + model // 4)
    return [most * i // 8 for i in range(9)] if most else []


def predicted(
    file: "GGUFFile", profile: "MachineProfile", vram: int | None, context: int, batch: int
) -> dict[str, Any]:
    """One budget: placement, memory by tier, prefill and decode with their bounds."""
    from greenroom.models.registry import place_of, read_config
    from greenroom.placement import predict
    from greenroom.placement.hardware import Gpu, Hardware
    from greenroom.placement.planner import Wish, place
    from greenroom.placement.work import Work
    from greenroom.placement.worth import worthwhile

    place_of(file)
    config = read_config(file)
    gpu = None
    if profile.gpu is not None and profile.vram:
        gpu = Gpu(profile.gpu, profile.vram_total, profile.vram_total)
    wish = Wish(vram=vram, named=vram is not None, sequences=batch, context=context)
    found = place(file.tensors, config, wish, Hardware(gpu, f"{profile.name} has no GPU"))
    found = worthwhile(found, file.tensors, config, profile)
    work = Work.of(file.tensors, config)
    there = sum(found.parts.values())
    cache = 0 if found.layers_on_gpu else work.cache * context * batch
    outside = file.nbytes - found.parts.get("dense", 0) + cache
    return {
        "vram": vram,
        "backend": found.backend,
        "reason": found.reason,
        "memory": {"vram": there, "ram": outside},
        "experts_in_vram": predict.resident(found, work),
        "prefill": asdict(predict.prefill(work, found, profile, _PROMPT)),
        "decode": asdict(predict.decode(work, found, profile, context, batch)),
    }


def _show(document: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from greenroom.commands.console import size

    console = Console(highlight=False)
    chosen = document["plan"]
    console.print(f"{document['model']['name']}, {size(document['model']['bytes'])}")
    console.print(chosen["reason"])
    verdict = "fits" if document["fits_ram"] else "does NOT fit"
    console.print(f"RAM: {size(chosen['memory']['ram'])} of {size(document['ram'])}: {verdict}")
    console.print(f"tokens/s of a prompt of {document['prompt']} tokens (prefill) and of decode")
    head = ("VRAM", "used", "experts", "prefill", "decode", "limited by: prefill; decode")
    table = Table(*head, box=None, padding=(0, 1, 0, 0))
    for row in _rows(document):
        table.add_row(*row)
    console.print(table)


def _rows(document: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    from greenroom.commands.console import size

    for row in document["sweep"] or [document["plan"]]:
        yield (
            "max" if row["vram"] is None else size(row["vram"]),
            size(row["memory"]["vram"]),
            f"{row['experts_in_vram']:.0%}",
            f"{row['prefill']['rate']:.0f}",
            f"{row['decode']['rate']:.1f}",
            f"{row['prefill']['bound']}; {row['decode']['bound']}",
        )


def draw(document: dict[str, Any], path: Path) -> None:
    """Decode rate over VRAM as a PNG; one line on standard error without matplotlib."""
    from greenroom.commands.console import errors

    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        errors.print("matplotlib is missing, so no plot was drawn")
        return
    rows = [row for row in document["sweep"] if row["vram"] is not None]
    if not rows:
        errors.print("this machine has no VRAM to draw speed over; --machine names another")
        return
    figure, axis = pyplot.subplots(figsize=(5, 3))
    axis.plot([r["vram"] / 2**30 for r in rows], [r["decode"]["rate"] for r in rows], marker="o")
    axis.set_xlabel("VRAM, GiB")
    axis.set_ylabel("decode, tokens/s (predicted)")
    axis.set_ylim(bottom=0)
    axis.set_title(f"{document['model']['name']}\n{document['machine']['name']}", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
