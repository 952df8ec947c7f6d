"""`greenroom convert`: a checkpoint, or an old file, to one GGUF file."""

from pathlib import Path
from typing import Annotated

import typer


def convert(
    source: Annotated[Path, typer.Argument(help="A folder in HF's layout, or an old GGUF file.")],
    out: Annotated[Path, typer.Argument(help="The GGUF file to write.")],
    type: Annotated[
        str, typer.Option(help="Type of the matrices, e.g. BF16, Q8_0, Q4_K_M; auto keeps them.")
    ] = "auto",
    tensor_type: Annotated[
        list[str] | None, typer.Option(help="REGEX=TYPE for single tensors; may be repeated.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the quantisers.", min=1)] = None,
) -> None:
    """Convert a checkpoint in safetensors to GGUF, with its tokenizer and chat template.

    Takes gpt-oss (also OpenAI's own layout), Phi-3.5-MoE, GRIN-MoE, DeepSeek-MoE, Mixtral, Qwen2
    and Qwen3 (MoE and dense), OLMoE, Granite MoE and Llama. A GGUF file with one tensor per
    expert is written again with merged experts. Memory stays small whatever the model's size.
    The file appears when it is whole; a run that was stopped goes on when it is run again.
    """
    from greenroom.commands.progress import resumable, say_resumed
    from greenroom.convert.convert import Conversion
    from greenroom.convert.convert import convert as run
    from greenroom.convert.legacy import merge_experts

    with resumable(out) as progress:
        if source.is_file():
            found = merge_experts(source, out, progress)
        else:
            job = Conversion(source, type, tensor_type or (), name, threads)
            found = run(job, out, progress)
    say_resumed(found)
    typer.echo(f"{out}: {out.stat().st_size / 2**30:.2f} GiB")
