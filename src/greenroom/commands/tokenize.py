"""`greenroom tokenize`: the token ids and pieces of a text, by the tokenizer in a model file."""

import json
import sys
from typing import Annotated

import typer
from typer import Argument, Option

from greenroom.commands import options

Text = Annotated[str | None, Argument(help="The text; '-' or nothing: standard input.")]
Special = Annotated[bool, Option("--special", help="Read control tokens in the text as such.")]
Add = Annotated[bool, Option("--add-special", help="Add BOS and EOS where the model wants them.")]
Ids = Annotated[bool, Option("--ids", help="Print the ids only, on one line.")]
Json = Annotated[bool, Option("--json", help="Print one JSON document.")]


def tokenize(
    model: options.Model,
    text: Text = None,
    special: Special = False,
    add_special: Add = False,
    ids_only: Ids = False,
    as_json: Json = False,
) -> None:
    """Print a text's token ids and pieces. Loads the tokenizer only, not the model."""
    if text is None and sys.stdin.isatty():
        raise typer.BadParameter("give a text, or pipe one into standard input")
    from greenroom.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_gguf(model)
    if text is None or text == "-":
        text = options.read_text(sys.stdin.read)
    ids = tokenizer.encode(text, add_special=add_special, parse_special=special)
    # A token may be half a character: its bytes are what is certain.
    pieces = [tokenizer.token_bytes(token).decode(errors="backslashreplace") for token in ids]
    if as_json:
        print(json.dumps({"ids": ids, "pieces": pieces}, ensure_ascii=False))
    elif ids_only:
        print(*ids)
    else:
        for token, piece in zip(ids, pieces, strict=True):
            print(f"{token:>8}  {json.dumps(piece, ensure_ascii=False)}")
        print(f"{len(ids)} tokens", file=sys.stderr)
