"""`greenroom completion SHELL`: a script that completes verbs, options and file names.

The script is complete in itself: pressing Tab starts no Python.
"""

from collections.abc import Mapping
from enum import StrEnum
from importlib import import_module
from typing import Annotated

import typer
import typer.main
from typer import Argument

Verbs = Mapping[str, tuple[str, Mapping[str, str]]]  # verb: summary, and {option: help}


class Shell(StrEnum):
    """The shells that scripts are written for."""

    bash = "bash"
    zsh = "zsh"
    fish = "fish"


def completion(
    shell: Annotated[Shell, Argument(help="The shell that is to read the script.")],
) -> None:
    """Print a script for the shell's completion.

    bash: `source <(greenroom completion bash)` in ~/.bashrc; zsh: the same with zsh in
    ~/.zshrc, after compinit; fish: `greenroom completion fish | source`.
    """
    print(SCRIPTS[shell](verbs()))


def verbs() -> Verbs:
    """All verbs with their options, as the commands themselves declare them."""
    from greenroom.commands import COMMANDS

    return {verb: (summary, _options(verb, module)) for verb, (module, summary) in COMMANDS.items()}


def _options(verb: str, module: str) -> dict[str, str]:
    app = typer.Typer(add_completion=False)
    app.command(verb)(getattr(import_module(module), verb.replace("-", "_")))
    found = {"--help": "Show what the command takes."}
    for parameter in typer.main.get_command(app).params:
        for name in (*parameter.opts, *parameter.secondary_opts):
            if name.startswith("--"):
                found[name] = " ".join(str(getattr(parameter, "help", None) or "").split())
    return found


def bash(commands: Verbs) -> str:
    """The script for bash."""
    cases = [f"    {verb}) words='{' '.join(known)}' ;;" for verb, (_, known) in commands.items()]
    return "\n".join(
        [
            "_greenroom() {",
            '  local word="${COMP_WORDS[COMP_CWORD]}" words=""',
            "  if (( COMP_CWORD == 1 )); then",
            f"    words='{' '.join(commands)} --help --version'",
            '    COMPREPLY=($(compgen -W "$words" -- "$word")); return',
            "  fi",
            '  case "${COMP_WORDS[1]}" in',
            *cases,
            "  esac",
            "  if [[ $word == -* ]]; then",
            '    COMPREPLY=($(compgen -W "$words" -- "$word"))',
            "  else",
            "    local IFS=$'\\n'; COMPREPLY=($(compgen -f -- \"$word\"))",
            "  fi",
            "}",
            "complete -o filenames -F _greenroom greenroom",
        ]
    )


def _quoted(text: str) -> str:
    """In single quotes, as all three shells read them."""
    return "'" + text.replace("\\", "").replace("'", "") + "'"


def zsh(commands: Verbs) -> str:
    """The script for zsh."""

    def described(words: Mapping[str, str]) -> str:
        return " ".join(_quoted(f"{word}:{text.replace(':', ';')}") for word, text in words.items())

    summaries = {verb: summary for verb, (summary, _) in commands.items()}
    cases = [
        f"    {verb}) options=({described(known)}) ;;" for verb, (_, known) in commands.items()
    ]
    return "\n".join(
        [
            "#compdef greenroom",
            "_greenroom() {",
            "  local -a verbs options",
            "  if (( CURRENT == 2 )); then",
            f"    verbs=({described(summaries)})",
            "    _describe command verbs; return",
            "  fi",
            "  case $words[2] in",
            *cases,
            "  esac",
            "  if [[ $PREFIX == -* ]]; then _describe option options; else _files; fi",
            "}",
            'if [[ "$funcstack[1]" == _greenroom ]]; then',
            '  _greenroom "$@"',
            "else",
            "  compdef _greenroom greenroom",
            "fi",
        ]
    )


def fish(commands: Verbs) -> str:
    """The script for fish."""
    lines = []
    for verb, (summary, known) in commands.items():
        lines.append(
            f"complete -c greenroom -n __fish_use_subcommand -f -a {verb} -d {_quoted(summary)}"
        )
        for option, text in known.items():
            lines.append(
                f"complete -c greenroom -n '__fish_seen_subcommand_from {verb}' "
                f"-l {option.removeprefix('--')} -d {_quoted(text)}"
            )
    return "\n".join(lines)


SCRIPTS = {Shell.bash: bash, Shell.zsh: zsh, Shell.fish: fish}
