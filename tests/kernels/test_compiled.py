"""The kernels compile for a GPU: the interpreter accepts more than the compiler does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from greenroom.kernels.packed import FORMATS

SCRIPT = Path(__file__).with_name("compile_all.py")


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux only")
def test_every_kernel_compiles() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, SCRIPT, "90", "quick"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split()[0] for line in done.stdout.splitlines()]
    kernels = {"_four", "_attend", "_merge", "_enter", "_norm", "_rowmajor"}
    assert set(lines) == kernels | {
        "_dequantise", "_publish", "_gate_up", "_down", "_reduce", "_scaled", "_activated", "_add",
        "_product", "_carry", "_gather", "_direct", "_count",
        "_order",
        "_walk", "_dots", "_logits", "_choose", "_split", "_ring", "_collect",
        "_send", "_tell", "_meet", "_fetch", "_pick",
    }  # fmt: skip
    assert lines.count("_dequantise") == len({form.scales for form in FORMATS.values()}) + 1
