"""Shell completion: the scripts know the verbs and options that exist, and shells run them."""

import shutil
import subprocess

import pytest

from greenroom.commands import COMMANDS, completion, main


def complete(*words: str) -> set[str]:
    """What bash offers for the last word."""
    script = completion.bash(completion.verbs())
    listed = " ".join(f"'{word}'" for word in words)
    ask = f"COMP_WORDS=({listed}); COMP_CWORD={len(words) - 1}; _greenroom"
    command = f"{script}\n{ask}; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return set(done.stdout.split())


def test_bash_completes_verbs_and_options() -> None:
    assert complete("greenroom", "ser") == {"serve"}
    assert complete("greenroom", "") == {*COMMANDS, "--help", "--version"}
    assert {"--vram", "--help"} <= complete("greenroom", "run", "--")
    assert complete("greenroom", "serve", "--prefix-") == {"--prefix-ram"}


def test_bash_completes_files(tmp_path, monkeypatch) -> None:
    (tmp_path / "model.gguf").touch()
    monkeypatch.chdir(tmp_path)
    assert complete("greenroom", "run", "mod") == {"model.gguf"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_script_is_printed_and_names_everything(shell, capsys) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for verb, (_, options) in completion.verbs().items():
        assert verb in script
        for option in options:
            assert (option.removeprefix("--") if shell == "fish" else option) in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)


def test_other_shells_are_refused(capsys) -> None:
    assert main(["completion", "tcsh"]) == 2
