"""The command line as a user meets it: fast help, one line per error, exit statuses."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from greenroom.commands import COMMANDS, guarded, main
from greenroom.errors import GreenroomError


def run(*arguments: str, code: str = "") -> "subprocess.CompletedProcess[str]":
    call = [sys.executable, "-m", "greenroom", *arguments]
    return subprocess.run(call, capture_output=True, text=True, timeout=60, check=False)


def test_help_lists_every_command_without_importing_it() -> None:
    code = (
        "import sys; from greenroom.commands import main; status = main(['--help']);"
        "print(status, [m for m in ('torch', 'numpy', 'typer', 'rich') if m in sys.modules])"
    )
    call = [sys.executable, "-c", code]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("0 []\n")
    for name in COMMANDS:
        assert f"  {name}" in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    assert callable(getattr(import_module(COMMANDS[name][0]), name.replace("-", "_")))
    assert main([name, "--help"]) == 0


def test_version() -> None:
    assert run("--version").stdout == "greenroom 0.1.0\n"


def test_an_unknown_command_gets_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rnu"]) == 2
    assert "did you mean 'run'?" in capsys.readouterr().err


def test_a_wrong_call_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "model.gguf", "hi", "--no-such-option"]) == 2
    line = "greenroom: run: no such option: --no-such-option; 'greenroom run --help' tells more\n"
    assert capsys.readouterr().err == line
    assert main(["plan"]) == 2
    line = "greenroom: plan: missing argument 'model'; 'greenroom plan --help' tells more\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("vram is 5 MiB, but 9 MiB are needed", "--vram is 5 MiB, but 9 MiB are needed"),
        ("ram must be a size like 6GiB, not 'ram'", "--ram must be a size like 6GiB, not 'ram'"),
        ("lower context_length or cache_tokens", "lower --context or --cache-tokens"),
        ("raise --vram or lower --context", "raise --vram or lower --context"),
        ("lower max_tokens. Or max_sequences", "lower --max-tokens. Or --max-sequences"),
        ("threads must be 1, threads wait", "--threads must be 1, threads wait"),
        ("its threads stop", "its threads stop"),
        ("/models/vram/ram.gguf: no top_k.gguf", "/models/vram/ram.gguf: no top_k.gguf"),
        ("1 GiB of RAM and of VRAM, in-ram", "1 GiB of RAM and of VRAM, in-ram"),
    ],
)
def test_settings_are_called_what_was_typed(
    said: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> None:
        raise GreenroomError(said)

    assert guarded(fails)() == 1
    assert capsys.readouterr().err == f"greenroom: {shown}\n"


def test_help_tells_defaults_that_are_found_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "[default: physical cores]" in shown
    assert "unless --raw is given. Without --max-tokens an answer has at most 1024." in shown


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (GreenroomError("model.gguf: broken;\n try another"), 1, "model.gguf: broken; try another"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (FileNotFoundError(2, "No such file", "x.gguf"), 1, "x.gguf: No such file"),
        (MemoryError(), 1, "out of memory; choose a smaller model or context"),
    ],
)
def test_errors_become_one_line(
    error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    assert guarded(fail)() == status
    assert capsys.readouterr().err == f"greenroom: {line}\n"


def test_a_missing_model_is_one_line(tmp_path: Path) -> None:
    done = run("run", str(tmp_path / "missing.gguf"), "hello")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "missing.gguf" in done.stderr


def test_a_model_may_be_named_as_list_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshot = tmp_path / "models--owner--tiny/snapshots/1"
    snapshot.mkdir(parents=True)
    assert main(["synth", "mixtral-8x7b-tiny", str(snapshot / "tiny-Q4_K_M.gguf")]) == 0
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert main(["list"]) == 0
    assert "owner/tiny:Q4_K_M" in capsys.readouterr().out
    assert main(["inspect", "owner/tiny:Q4_K_M"]) == 0
    assert "Mixtral" in capsys.readouterr().out
    assert main(["inspect", "nobody"]) == 1
    line = "greenroom: nobody: no such file or model; see 'greenroom list', or "
    assert capsys.readouterr().err == line + "'greenroom pull owner/repo'\n"


def test_without_the_server_s_packages_models_are_listed_and_serve_says_what_to_install(
    model: Path, tmp_path: Path
) -> None:
    code = (
        "import sys; sys.modules |= dict.fromkeys(('fastapi', 'starlette', 'uvicorn'));"
        "from greenroom.commands import main; sys.exit(main(sys.argv[1:]))"
    )

    def bare(*arguments: str) -> "subprocess.CompletedProcess[str]":
        call = [sys.executable, "-c", code, *arguments]
        return subprocess.run(call, capture_output=True, text=True, timeout=60, check=False)

    assert bare("list").returncode == bare("show", str(model)).returncode == 0
    done = bare("serve", str(model))
    assert done.returncode == 1
    assert done.stderr.startswith("greenroom: the server needs ")
    assert "pip install 'greenroom[server]'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_bad_parameter_is_refused_before_loading(tmp_path: Path) -> None:
    done = run("run", str(tmp_path / "missing.gguf"), "hello", "--top-p", "3")
    assert done.returncode == 1
    assert "--top-p must be more than 0 and at most 1, not 3" in done.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("commands") / "tiny.gguf"
    # With this seed the likeliest tokens go on for thousands, without an end.
    assert main(["synth", "gpt-oss-20b-tiny", str(path), "--seed", "2"]) == 0
    return path


SMALL = ("--reference", "--threads", "1", "--context", "200", "--temperature", "0")


def test_run_prints_text_and_a_table(model: Path) -> None:
    done = run("run", str(model), "hello", "--raw", "--max-tokens", "7", *SMALL)
    assert done.returncode == 0
    assert done.stdout.strip()
    for word in ("prompt", "generated", "first token", "tokens/s", "memory", "kv cache"):
        assert word in done.stderr


def test_run_prints_json_and_reads_a_pipe(model: Path) -> None:
    call = [sys.executable, "-m", "greenroom", "run", str(model), "-", "--raw", "--json"]
    call += ["--max-tokens", "7", *SMALL]
    done = subprocess.run(call, input="hello", capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert result["generated_tokens"] == 7
    assert result["finish_reason"] == "length"
    assert result["time_to_first_token_s"] > 0
    assert result["generation_tokens_per_s"] > 0
    assert result["memory_bytes"]["kv_cache"] > 0


def test_an_empty_prompt_and_a_wrong_trace_are_one_line(model: Path, tmp_path: Path) -> None:
    done = run("run", str(model), " ", *SMALL)
    assert done.returncode == 1
    assert done.stderr.startswith("greenroom: the prompt is empty; give one")
    (tmp_path / "trace.npz").write_text("no trace")
    done = run("run", str(model), "hello", "--trace", str(tmp_path / "trace.npz"), *SMALL)
    assert done.returncode == 1
    assert "trace.npz: this is no trace" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("verb", ["run", "tokenize", "chat"])
@pytest.mark.parametrize("how", ["strict", "surrogateescape"])
def test_input_of_another_encoding_is_one_line(model: Path, verb: str, how: str) -> None:
    call = [sys.executable, "-m", "greenroom", verb, str(model)]
    env = os.environ | {"PYTHONIOENCODING": f"utf-8:{how}"}
    done = subprocess.run(call, input=b"caf\xe9\n", capture_output=True, env=env, check=False)
    assert done.returncode == 1
    assert done.stderr == b"greenroom: standard input is not UTF-8 text; convert it\n"


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(model: Path) -> None:
    done = run("run", str(model), "word " * 400, "--raw", *SMALL)
    assert done.returncode == 1
    assert "200 tokens" in done.stderr
    assert done.stderr.count("\n") == 1


def test_control_c_ends_with_130_and_no_traceback(model: Path) -> None:
    call = [sys.executable, "-m", "greenroom", "run", str(model), "hello", "--raw", *SMALL]
    call += ["--max-tokens", "0", "--context", "100000"]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # A shell has its background jobs, and whatever they start, ignore Ctrl-C.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(call, **pipes, preexec_fn=heard) as process:
        assert process.stdout is not None
        process.stdout.read(1)  # it generates
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"Traceback" not in errors
    assert b"interrupted" in errors


def test_a_reader_that_leaves_is_no_error(model: Path) -> None:
    call = [sys.executable, "-m", "greenroom", "run", str(model), "hello", "--raw", *SMALL]
    call += ["--max-tokens", "0", "--context", "100000"]
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.wait(timeout=30) == 1
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()
