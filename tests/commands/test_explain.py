"""--explain: what the layers' experts cost, and how near the speed came to the machine's limit."""

import io

import pytest
from rich.console import Console

from greenroom import LLM, SamplingParams
from greenroom.commands import main
from greenroom.commands.explain import show_layers
from greenroom.placement import calibrate
from greenroom.placement.calibrate import MachineProfile


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    assert main(["synth", "gpt-oss-20b-tiny", str(path)]) == 0
    return str(path)


def test_a_layer_is_charged_with_the_experts_a_step_reads(model: str) -> None:
    params = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
    with LLM(model, vram=0, threads=1, max_sequences=1, context_length=128) as llm:
        llm.generate([[1, 2, 3]], params)
        assert "layers" not in llm.engine.stats()
        llm.engine.meter()
        llm.generate([list(range(40))], params)
        layers = llm.engine.stats()["layers"]
        slab = llm.engine.model.blk[0].ffn.experts.layout.nbytes
    assert [layer["layer"] for layer in layers] == [0, 1, 2, 3]
    for layer in layers:
        assert layer["short"]["calls"] >= 4  # one token each; the last of a prompt may be alone
        assert layer["short"]["nbytes"] == layer["short"]["calls"] * 4 * slab
        assert layer["short"]["seconds"] > 0
    assert layers[0]["long"]["calls"] == 1
    assert 4 * slab < layers[0]["long"]["nbytes"] <= 16 * slab


def test_run_explains_against_the_measured_machine(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = MachineProfile(
        fingerprint="", name="a machine", date="2026-11-24", threads=1, ram=1 << 34,
        dram={1: 1000.0}, experts={"MXFP4": 1000.0}, dense={"Q8_0": 1000.0},
        experts_batch={"MXFP4": 1e6, "Q8_0": 1e6},
    )  # fmt: skip
    command = ["run", model, "hello", "--raw", "--max-tokens", "4", "--vram", "0", "--explain"]
    monkeypatch.setattr(calibrate, "saved_profile", lambda fingerprint: None)
    assert main(command) == 0
    words = " ".join(capsys.readouterr().err.split())
    assert "layer short steps ms MiB GB/s hits long steps ms" in words
    assert "measure it with 'greenroom doctor' first" in words
    monkeypatch.setattr(calibrate, "saved_profile", lambda fingerprint: profile)
    assert main(command) == 0
    words = " ".join(capsys.readouterr().err.split())
    assert "generation: " in words
    assert " % of " in words.replace("% of", " % of")
    assert "limited by experts from RAM" in words or "limited by dense layers from RAM" in words
    assert main(command[:-1]) == 0
    assert "short steps" not in capsys.readouterr().err


def test_rows_have_what_a_step_took_and_the_last_one_their_sum() -> None:
    """A layer most of whose experts have slots is asked in fewer steps than another."""
    none = {"calls": 0, "seconds": 0.0, "nbytes": 0}
    long = {"calls": 2, "seconds": 0.5, "nbytes": 1 << 30}
    layers = [
        {"layer": 1, "short": {"calls": 10, "seconds": 0.02, "nbytes": 20 << 20}, "long": none},
        {"layer": 2, "short": {"calls": 4, "seconds": 0.04, "nbytes": 20 << 20}, "long": long},
        {"layer": 3, "short": none, "long": {**long, "calls": 1}},
    ]
    console = Console(width=120, record=True, file=io.StringIO())
    uses = {"layer_hits": [5, 10, 40], "layer_routes": [40, 40, 40], "bus": "the GPU reads 1 of 4"}
    show_layers(layers, uses, console)
    rows = [line.split() for line in console.export_text().splitlines()]
    assert rows[1] == ["1", "10", "2.000", "2.0", "1.0", "12.5%", "0", "0.00"]
    assert rows[2] == ["2", "4", "10.000", "5.0", "0.5", "25.0%", "2", "250.00"]
    assert rows[3] == ["3", "0", "0.000", "0.0", "-", "100.0%", "1", "500.00"]
    # 2 + 10 ms, 2 + 5 MiB, 7 MiB in 12 ms, 55 of 120 routes, 250 + 500 ms
    assert rows[4] == ["all", "12.000", "7.0", "0.6", "45.8%", "750.00"]
    assert " ".join(rows[5]) == "Short steps: the GPU reads 1 of 4."
