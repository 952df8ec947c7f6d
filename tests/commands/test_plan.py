"""`greenroom plan`: predictions worked by hand, headers alone, and what is refused."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import httpx
import pytest

from greenroom.commands import main
from greenroom.convert.remote import fetch_header
from greenroom.convert.synth import Synthesis, write_synthetic
from greenroom.convert.synth_shapes import shape_of
from greenroom.errors import ModelFileError
from greenroom.experts.quota import binomial
from greenroom.gguf import GGUFFile
from greenroom.gguf.header import read_header
from greenroom.models.loader import read_config
from greenroom.placement import predict
from greenroom.placement.calibrate import MachineProfile, save_profile
from greenroom.placement.cpu_seconds import FINE, CpuSeconds, tiles
from greenroom.placement.placement import Placement
from greenroom.placement.work import Work

from ..placement.profiles import GPU

WORK = Work(
    experts={"X": 10 * 10**9}, dense={"X": 10**9}, expert_values={"X": 20 * 10**9},
    dense_values={"X": 2 * 10**9}, share=0.1, count=10, layers=10, cache=0,
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


def both(computing: float, reading: float) -> float:
    """Seconds of computing and reading at once."""
    return float((computing**3 + reading**3) ** (1 / 3))


def test_prefill_computes_the_head_once() -> None:
    # No experts, 1e9 weights of body: six tiles of 16 tokens take 32 ms each at 1e12 operations,
    # one of 4 takes 8 ms; the first reads 0.5 GB besides, 5 ms, and the head 0.5 GB as well
    work = replace(
        WORK, experts={}, expert_values={}, head={"X": 5 * 10**8}, head_values={"X": 10**9}
    )
    found = predict.prefill(work, Placement("native", "", layers=10), GPU, 100)
    assert found.rate == pytest.approx(100 / (both(0.032, 0.005) + 5 * 0.032 + 0.008 + 0.005))


def test_a_long_prompt_takes_several_steps() -> None:
    # 512, 512 and 176 tokens: 32, 32 and 11 tiles of 64 ms over 2e9 weights, 10 ms to read each
    # time; a step has 1 ms, the first 2 more, a token 1 us
    machine = replace(GPU, step_seconds=1e-3, prompt_seconds=2e-3, token_seconds=1e-6)
    work = replace(WORK, experts={}, expert_values={})
    found = predict.prefill(work, Placement("native", "", layers=10), machine, 600, 2)
    seconds = 72 * 0.064 + 3 * both(0.064, 0.010) + 5e-3 + 1200 * 1e-6
    assert found.rate == pytest.approx(1200 / seconds)


def test_decode_with_half_of_the_experts_in_vram() -> None:
    # dense 1 ms; misses 0.5 GB / 50 = 10 ms, longer than the hits' 0.5 ms; 10 handshakes, the
    # short kernels of 10 layers, the host
    place = Placement("cuda", "", layers=10, layers_on_gpu=10, head_on_gpu=True, slots=50)
    found = predict.decode(WORK, place, GPU, 0)
    assert found.rate == pytest.approx(1 / (0.001 + 0.010 + 10 * (11e-6 + 43e-6)))


def test_tiles_of_tokens() -> None:
    counts = (1, 2, 5, 12, 13, 16, 31, 100)
    assert [tiles(n) for n in counts] == [
        {1: 1}, {4: 1}, {4: 1, 1: 1}, {4: 3}, {16: 1}, {16: 1}, {16: 2}, {16: 6, 4: 1},
    ]  # fmt: skip
    counts = (1, 2, 3, 5, 6, 7, 9, 10, 12, 13, 23, 100)
    assert [tiles(n, fine=True) for n in counts] == [
        {1: 1}, {2: 1}, {4: 1}, {4: 1, 1: 1}, {4: 1, 2: 1}, {8: 1}, {8: 1, 1: 1}, {8: 1, 2: 1},
        {8: 1, 4: 1}, {16: 1}, {16: 1, 8: 1}, {16: 6, 4: 1},
    ]  # fmt: skip


def test_tiles_are_those_of_the_kernels() -> None:
    source = (Path(__file__).parents[2] / "csrc" / "simd" / "avx512.h").read_text()
    found = re.search(r"tile_widths\[\] = {(.*), wide_tile}, tile_least\[\] = {(.*)};", source)
    assert found
    widths, least = ([int(n) for n in of.split(", ")] for of in found.groups())
    assert dict(zip([*widths, 16], least, strict=True)) == FINE


def test_decode_batches_share_experts() -> None:
    # 2 tokens with 0.1 each meet 1 - 0.9 * 0.9 of the experts, which have 0.2 / 0.19 tokens each
    assert WORK.touched(2) == pytest.approx(0.19)
    assert WORK.per_expert(2) == pytest.approx(0.2 / 0.19)
    assert binomial(2, 0.1) == pytest.approx({1: 0.18, 2: 0.01})
    assert (binomial(3, 1.0), binomial(3, 0.0)) == ({3: 1.0}, {})


def test_a_batch_takes_the_kernels_time_of_its_tiles() -> None:
    # 4 tokens: dense 8 * 2e9 operations at 200e9 = 80 ms and 10 ms of reading. Experts: 0.2916 of
    # them have one token, 40e9 operations at 400e9 = 100 ms; 0.0523 two to four, 160e9 at 200e9 =
    # 800 ms; reading all of them takes 200 ms. A further sequence costs 1 ms.
    given = {"tile_one": 400.0, "tile_four": 200.0, "tile_wide": 300.0, "tile_further": 300.0}
    machine = replace(GPU, **{name: {"X": rate} for name, rate in given.items()})
    machine = replace(machine, sequence_seconds=1e-3)
    found = predict.decode(WORK, Placement("native", "", layers=10), machine, 0, batch=4)
    experts = 0.2916 * both(0.1, 0.2) + 0.0523 * both(0.8, 0.2)
    assert found.rate == pytest.approx(4 / (both(0.08, 0.01) + experts + 0.003))


def test_tiles_of_2_and_8_tokens_where_they_were_measured() -> None:
    # 2e9 weights, 4e9 operations a token: 2 tokens 8e9 at 250e9 = 32 ms, 8 tokens 32e9 at 320e9 =
    # 100 ms, 1 and 4 tokens 10 and 40 ms; 5 ms of reading beside the first. Where there are no
    # tiles of 2 and 8, they take one of 4 and two of 4.
    given = {"tile_one": 400.0, "tile_four": 400.0, "tile_wide": 400.0, "tile_further": 800.0}
    coarse = replace(GPU, dense={"X": 200.0}, **{name: {"X": rate} for name, rate in given.items()})
    fine = replace(coarse, tile_two={"X": 250.0}, tile_eight={"X": 320.0})

    def seconds(machine: MachineProfile, tokens: int) -> float:
        return CpuSeconds(machine, WORK).dense(WORK.dense, tokens, WORK.dense_values)

    assert seconds(coarse, 2) == pytest.approx(both(0.04, 0.005))
    assert seconds(fine, 2) == pytest.approx(both(0.032, 0.005))
    assert seconds(coarse, 8) == pytest.approx(both(0.04, 0.005) + 0.04)
    assert seconds(fine, 8) == pytest.approx(both(0.1, 0.005))
    assert seconds(fine, 11) == pytest.approx(both(0.1, 0.005) + 0.04)
    # 16 tokens take 160 ms, further ones 80
    assert seconds(fine, 42) == pytest.approx(both(0.16, 0.005) + 0.08 + 0.1 + 0.032)
    assert seconds(replace(fine, tile_eight={}), 2) == seconds(coarse, 2)


def test_a_model_in_the_cache_is_read_faster() -> None:
    # 1 GB at 100 GB/s from RAM; what is 8 GB or less is read at twice the rate, with keys and
    # values of 4 GB, half of the way to 32 GB by logarithms, at 1 / 1.5
    work = replace(WORK, experts={}, expert_values={}, dense={"X": 8 << 30})
    machine = replace(GPU, reads={8 << 10: 200.0, 32 << 10: 100.0})
    seconds = (8 << 30) / 100e9
    reading = CpuSeconds(machine, work).dense(work.dense, 1, work.dense_values)
    assert reading == pytest.approx(seconds / 2)
    reading = CpuSeconds(machine, work, 8 << 30).dense(work.dense, 1, work.dense_values)
    assert reading == pytest.approx(seconds * 0.75)


def test_numbers_of_narrow_matrices_cost_besides_their_products() -> None:
    # 2e9 weights and 2e7 rows: 4e9 operations of wide matrices give 976,562.5 numbers; 1 us each
    # for the others and 10 tokens. Each row of an expert's down matrix takes 1 us for each of the
    # 10 * 0.1 tokens, of an MLP for each of 10.
    machine = replace(GPU, dense_output_seconds=1e-6, expert_output_seconds=1e-6)
    work = replace(WORK, expert_outputs=10**6, mlp_outputs=10**5)
    free, paid = CpuSeconds(GPU, work), CpuSeconds(machine, work)
    given = (work.dense, 10, work.dense_values)
    more = paid.dense(*given, 2 * 10**7) - free.dense(*given, 2 * 10**7)
    assert more == pytest.approx(10e-6 * (2 * 10**7 - 976_562.5))
    assert paid.dense(*given, 10**5) == free.dense(*given)  # wide
    assert paid.experts(10) - free.experts(10) == pytest.approx(1.0)
    assert paid.between(10) == pytest.approx(1.0)


def test_attention_scores_half_a_tile_in_vain_at_either_end() -> None:
    # measured over 512 tokens: 256.5 keys and 32 in vain for each query, 10 operations each
    machine = replace(GPU, attention_prompt=100.0)
    cpu = CpuSeconds(machine, replace(WORK, windows=(None,), scores=10))
    whole = cpu.attention_prompt(1, 512)
    assert whole == pytest.approx(512 * 256.5 * 10 / 100e9)
    short = 64 * (32.5 + 32) / (512 * 288.5) * whole
    assert cpu.attention_prompt(2, 64) == pytest.approx(2 * short)
    # 512 queries with a window of 2 see 1,023 keys, and two half tiles each
    windowed = CpuSeconds(machine, replace(WORK, windows=(2,), scores=10))
    expected = (1023 + 512 * 64) / (512 * 288.5) * whole
    assert windowed.attention_prompt(1, 512) == pytest.approx(expected)


def test_norms_take_time_for_every_number() -> None:
    # 30 ms of reading and 1e6 numbers of 10 ns
    work = replace(WORK, passed=10**6)
    found = predict.decode(
        work, Placement("native", "", layers=10), replace(GPU, norm_seconds=1e-8), 0
    )
    assert found.rate == pytest.approx(1 / 0.04)


def test_attention_counts_pairs_within_the_window() -> None:
    # 4 queries see 1 + 2 + 3 + 4 keys, with a window of 2 only 1 + 2 + 2 + 2; 10 operations each
    work = replace(WORK, windows=(None, 2), scores=10, kv_heads=3, kv=100)
    assert work.attended(0, 4) == 170
    assert work.attended(3, 4) == 10 * (4 + 2)
    assert work.cached(4) == 600
    # 60 operations of 1 ms beside the 30 ms of reading
    machine = replace(GPU, attention_prompt=1e-6 * 256.5 / 288.5)
    found = predict.decode(work, Placement("native", "", layers=10), machine, 4)
    assert found.rate == pytest.approx(1 / 0.090)
    # 4 queries of 256 and 512 operations take 1,024 and 2,048 ms of a key's 1,124 and 2,248: with
    # every 256 bytes 100 ms, for 6 keys of 100 bytes 234.375 ms
    machine = replace(machine, attention_step=1.024e-6 / 1.124)
    found = predict.decode(work, Placement("native", "", layers=10), machine, 4)
    assert found.rate == pytest.approx(1 / (0.090 + 0.234375))


def test_the_last_layer_of_a_prompt_serves_its_last_token() -> None:
    # experts with 32 tokens each, all of them: two tiles of 640 ms, the first with 200 ms of
    # reading, half of it; the other half is read for one token
    work = replace(WORK, dense={}, dense_values={}, late=0.5, share=1.0)
    found = predict.prefill(work, Placement("native", "", layers=10), GPU, 32)
    assert found.rate == pytest.approx(32 / ((0.64 + both(0.64, 0.2)) / 2 + 0.1))


def test_work_is_read_off_the_tensors(tmp_path) -> None:
    path = tmp_path / "m.gguf"
    write_synthetic(Synthesis(shape_of("deepseek-moe-16b-tiny", 3)), path)
    with GGUFFile(path) as file:
        work = Work.of(file.tensors, read_config(file))
    # 256 wide, 16 experts of 288 in two layers, shared ones, a dense layer of 544
    assert sum(work.expert_values.values()) == 2 * 16 * 3 * 256 * 288
    assert work.expert_outputs == 2 * 16 * 256
    assert work.mlp_outputs == 2 * 256  # the last layer's serves the last token alone
    assert work.head_outputs == 4096 + 16  # and its router
    # q, k, v, output; gate, up, down; twice the router, three of experts and of the shared ones
    assert work.matrices == 1 + 3 * 4 + 3 + 2 * 7
    assert (work.heads, work.kv_heads, work.kv) == (4, 4, 4 * 2 * 64 * 2)


def test_prefill_streams_experts() -> None:
    # 512 tokens: (2 + 2) * 1e9 * 2 * 512 operations at a third of 1e14 = 124 ms; 51.2 rows an
    # expert straight from 10 GB at 0.22 * 4e12 = 11.4 ms, but 204.8 rows of 2,048 tokens expanded,
    # 10 + 80 GB at 0.6 * 4e12 = 37.5 ms. 10 GB / 25 = 400 ms of copies, 4 ms an expert. An expert's
    # weights take the CPU 1.3 ms (75 GB/s) and 35.2 more tokens 14.1 (1e12), with ten times the
    # rate 2.7 ms in all: with 0.95 ms to meet, one and five of ten are done within nine and five
    # copies, and one more is not.
    place = Placement(
        "cuda", "", layers=10, layers_on_gpu=10, head_on_gpu=True, staging=1, prefill_chunk=512
    )
    slow = replace(GPU, vram=4000.0, pcie_up={64: 25.0})
    for machine, copied in ((slow, 0.36), (replace(slow, experts_batch={"X": 1e4}), 0.20)):
        found = predict.prefill(WORK, place, machine, 512)
        assert found.rate == pytest.approx(512 / (copied + 10 * 0.4e-3 + 0.35e-3))
        assert found.bound == "experts over PCIe"
    quick = replace(GPU, vram=4000.0, pcie_up={64: 500.0})
    fast = replace(GPU, vram=1e6, pcie_up={64: 5000.0}, gpu_bf16=1e9)
    for tokens, expanding in ((512, 10e9 / (0.22 * 4e12)), (2048, 90e9 / (0.6 * 4e12))):
        place = replace(place, prefill_chunk=tokens)
        found = predict.prefill(WORK, place, quick, tokens)
        computed = 8e9 * tokens / 0.33e14 + expanding
        assert found.rate == pytest.approx(tokens / (computed + 10 * 0.4e-3 + 0.35e-3))
        assert found.bound == "products on the GPU"
        # what is computed in no time has to be launched: 2.2 ms a layer, or 4.7
        found = predict.prefill(WORK, place, fast, tokens)
        launched = 2.2e-3 if tokens == 512 else 4.7e-3
        assert found.rate == pytest.approx(tokens / (10 * (launched + 0.4e-3) + 0.35e-3))
        assert found.bound == "launches"


def test_prefill_of_few_tokens_multiplies_experts_in_slots_straight() -> None:
    # 512 tokens, 51.2 each: products 4.096e12 operations at a third of 1e14, 10 GB at 22 % of 4e12
    # and 0.2 ms a layer; nothing waits for the host. 2,048 tokens would be 205 each
    place = Placement(
        "cuda", "", layers=10, layers_on_gpu=10, head_on_gpu=True, staging=1, slots=100
    )
    machine = replace(GPU, vram=4000.0)
    found = predict.prefill(WORK, replace(place, prefill_chunk=512), machine, 512)
    seconds = 4.096e12 / 0.33e14 + 10e9 / (0.22 * 4e12) + 10 * 0.2e-3 + 0.35e-3
    assert found.rate == pytest.approx(512 / seconds)
    found = predict.prefill(WORK, replace(place, prefill_chunk=2048), machine, 2048)
    seconds = 4 * 4.096e12 / 0.33e14 + 90e9 / (0.6 * 4e12) + 10 * 0.4e-3 + 0.35e-3
    assert found.rate == pytest.approx(2048 / seconds)


def test_a_few_sequences_read_weights_in_vram_slower() -> None:
    # 1 + 10 GB at 1,000 GB/s, the experts' 1 - 0.9**4 = 34 %; a layer has 43 us
    place = Placement("cuda", "", layers=10, layers_on_gpu=10, head_on_gpu=True, slots=100)
    one = predict.decode(replace(WORK, share=1.0), place, GPU, 0)
    assert one.rate == pytest.approx(1 / (0.011 + 10 * 43e-6))
    four = predict.decode(WORK, place, GPU, 0, batch=4)
    assert four.rate == pytest.approx(4 / ((0.001 + 0.010 * 0.3439) / 0.38 + 10 * 43e-6))


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


class Hub(BaseHTTPRequestHandler):
    """A hub with one repository of one file, which it sends by ranges alone."""

    data: bytes = b""
    ranges: list[tuple[int, int]]

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/owner/repo"):
            files = [{"rfilename": "m-Q4_K_M.gguf", "size": len(self.data)}]
            self._send(200, json.dumps({"id": "owner/repo", "siblings": files}).encode())
        elif self.path == "/owner/repo/resolve/main/m-Q4_K_M.gguf" and "range" in self.headers:
            span = self.headers["range"].removeprefix("bytes=")
            first, last = map(int, span.split("-"))
            part = self.data[first : last + 1]
            self.ranges.append((first, len(part)))
            total = f"bytes {first}-{first + len(part) - 1}/{len(self.data)}"
            self._send(206, part, {"content-range": total})
        else:
            self._send(404, b"{}")

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        more = {"content-type": "application/json", "content-length": str(len(body))}
        for name, value in (more | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def test_a_model_on_the_hub_is_planned_from_its_header(tmp_path) -> None:
    source = tmp_path / "whole.gguf"
    write_synthetic(Synthesis(shape_of("gpt-oss-20b-tiny")), source)
    start = read_header(source.read_bytes(), "m").data_start
    kind = type("Hub", (Hub,), {"data": source.read_bytes(), "ranges": []})
    profile = save_profile(GPU, tmp_path / "machine.json")
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        environment = os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "hub"),
            "HF_HUB_OFFLINE": "0",
        }
        call = ["plan", "hf:owner/repo", "--machine", str(profile), "--json"]
        done = subprocess.run(
            [sys.executable, "-m", "greenroom", *call],
            env=environment, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        server.shutdown()
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["model"]["name"].startswith("gpt-oss 20b tiny")
    assert found["plan"]["decode"]["rate"] > 0
    fetched = sum(size for _, size in kind.ranges)
    assert kind.ranges[0][0] == 0
    assert start <= fetched < len(kind.data) / 2


def test_a_hub_out_of_reach_is_one_line_also_without_what_only_tests_install(tmp_path) -> None:
    code = (
        "import sys; sys.modules['httpx'] = None; from greenroom.commands import main;"
        "sys.exit(main(sys.argv[1:]))"
    )
    machine = ("--machine", str(save_profile(GPU, tmp_path / "machine.json")))
    for call in (["plan", "hf:owner/repo", *machine], ["pull", "owner/repo"]):
        environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-c", code, *call],
            env=environment, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode == 1
        assert done.stderr.startswith("greenroom: owner/repo: the ")
        assert done.stderr.count("\n") == 1, done.stderr


def test_what_is_neither_file_nor_shape_is_told_the_shapes(tmp_path, capsys) -> None:
    machine = str(save_profile(GPU, tmp_path / "machine.json"))
    assert main(["plan", "gpt-oss-20", "--machine", machine]) == 1
    assert "gpt-oss-20: no such file or shape; shapes are gpt-oss-20b," in capsys.readouterr().err
