"""`greenroom plan`: predictions worked by hand, headers alone, and what is refused."""

import json
from dataclasses import replace

import httpx
import pytest

from greenroom.commands import main
from greenroom.convert.remote import fetch_header
from greenroom.convert.synth import Synthesis, write_synthetic
from greenroom.convert.synth_shapes import shape_of
from greenroom.errors import ModelFileError
from greenroom.gguf import GGUFFile
from greenroom.placement import predict
from greenroom.placement.calibrate import MachineProfile, save_profile
from greenroom.placement.placement import Placement

GPU = MachineProfile(
    fingerprint="f" * 16, name="cpu + gpu", date="-", threads=4, ram=64 << 30, gpu="gpu",
    vram_total=80 << 30, dram={4: 100.0}, experts={"X": 50.0}, dense={"X": 100.0},
    experts_batch={"X": 1000.0}, dense_batch={"X": 2000.0}, vram=1000.0, gpu_bf16=1e5,
    pcie_up={64: 50.0},
)  # fmt: skip
WORK = predict.Work(
    experts={"X": 10 * 10**9}, dense={"X": 10**9}, expert_values=20 * 10**9,
    dense_values=2 * 10**9, share=0.1, count=10, layers=10, cache=0,
)  # fmt: skip


def test_decode_on_the_cpu() -> None:
    # dense 1 GB / 100 = 10 ms; experts 1 GB / 50 = 20 ms
    found = predict.decode(WORK, Placement("native", "", layers=10), GPU, 0)
    assert found.rate == pytest.approx(1 / 0.03)
    assert found.bound == "experts from RAM"


def test_a_step_and_its_matrices_take_time_of_their_own() -> None:
    # 30 ms of reading, 1 ms for the step and 100 times 10 us
    machine = replace(GPU, step_seconds=1e-3, matrix_seconds=1e-5)
    work = replace(WORK, matrices=100)
    found = predict.decode(work, Placement("native", "", layers=10), machine, 0)
    assert found.rate == pytest.approx(1 / 0.032)
    roofline = predict.decode(work, Placement("native", "", layers=10), machine, 0, hits=0.0)
    assert roofline.rate == pytest.approx(1 / 0.03)


def test_prefill_computes_the_head_once() -> None:
    # 100 tokens, no experts: (2 - 1) * 1e9 * 2 * 100 operations at 2e12 = 100 ms, and 0.5 GB of
    # head at 100 GB/s = 5 ms
    work = replace(WORK, experts={}, expert_values=0, head={"X": 5 * 10**8}, head_values=10**9)
    found = predict.prefill(work, Placement("native", "", layers=10), GPU, 100)
    assert found.rate == pytest.approx(100 / 0.105)


def test_decode_with_half_of_the_experts_in_vram() -> None:
    # dense 1 ms; misses 0.5 GB / 50 = 10 ms, longer than the hits' 0.5 ms; 10 handshakes
    place = Placement("cuda", "", layers=10, layers_on_gpu=10, slots=50)
    found = predict.decode(WORK, place, GPU, 0)
    assert found.rate == pytest.approx(1 / (0.001 + 0.010 + 10 * 11e-6))


def test_decode_batches_share_experts() -> None:
    assert WORK.touched(2) == pytest.approx(0.19)


def test_prefill_streams_experts() -> None:
    # 512 tokens: (2 + 2) * 1e9 * 2 * 512 operations at 1e14 = 41 ms; 10 GB / 50 = 200 ms
    place = Placement("cuda", "", layers=10, layers_on_gpu=10, staging=1, prefill_chunk=512)
    found = predict.prefill(WORK, place, GPU, 512)
    assert found.rate == pytest.approx(512 / 0.2)
    assert found.bound == "experts over PCIe"


def test_plan_of_a_shape(tmp_path, capsys) -> None:
    path = save_profile(GPU, tmp_path / "machine.json")
    call = ["plan", "gpt-oss-20b", "--machine", str(path), "--sweep", "--json"]
    assert main(call) == 0
    document = json.loads(capsys.readouterr().out)
    rates = [row["decode"]["rate"] for row in document["sweep"] if row["vram"] is not None]
    assert len(rates) == 9
    assert rates[-1] > 5 * rates[0]
    assert document["plan"]["experts_in_vram"] == 1.0
    assert document["fits_ram"] is True
    assert main([*call[:-1], "--plot", str(tmp_path / "p.png"), "--ram", "1GiB"]) == 0
    assert "does NOT fit" in capsys.readouterr().out


def test_an_unmeasured_machine_is_told_so(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("GREENROOM_HOME", str(tmp_path))
    assert main(["plan", "gpt-oss-20b-tiny"]) == 1
    assert "run 'greenroom doctor' first" in capsys.readouterr().err


def test_only_the_header_is_fetched(tmp_path, monkeypatch) -> None:
    source = tmp_path / "whole.gguf"
    write_synthetic(Synthesis(shape_of("gpt-oss-20b-tiny", 2)), source)
    data = source.read_bytes()
    monkeypatch.setattr("greenroom.convert.remote.FIRST_BYTES", 4096)
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        first, last = map(int, request.headers["range"].removeprefix("bytes=").split("-"))
        asked.append((first, last))
        part = data[first : last + 1]
        span = f"bytes {first}-{first + len(part) - 1}/{len(data)}"
        return httpx.Response(206, content=part, headers={"content-range": span})

    client = httpx.Client(transport=httpx.MockTransport(answer))
    count = fetch_header(client, "http://hub/m.gguf", tmp_path / "m.gguf")
    assert asked[0] == (0, 4095)
    assert count < len(data) / 2
    with GGUFFile(source) as whole, GGUFFile(tmp_path / "m.gguf") as header:
        assert {t.name: t.shape for t in header.tensors.values()} == {
            t.name: t.shape for t in whole.tensors.values()
        }
    refusing = httpx.Client(transport=httpx.MockTransport(lambda _: httpx.Response(401)))
    with pytest.raises(ModelFileError, match="401"):
        fetch_header(refusing, "http://hub/m.gguf", tmp_path / "n.gguf")
