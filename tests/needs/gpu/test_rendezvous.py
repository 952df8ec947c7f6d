"""On a CUDA device: recorded steps meet the CPU in every layer, fast, with the right numbers, and
nobody waits for ever when the other side is stuck."""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from greenroom import LLM, SamplingParams, native
from greenroom.convert.synth import Synthesis, write_synthetic
from greenroom.convert.synth_shapes import shape_of
from greenroom.errors import NativeError
from greenroom.experts import rendezvous
from greenroom.experts.cpu import CpuExperts
from greenroom.experts.rendezvous import Desk, trial
from greenroom.experts.slabs import SplitMatrices
from greenroom.gguf import GGMLType, random_blocks
from greenroom.kernels.rendezvous import collect

pytestmark = pytest.mark.gpu

os.environ.pop("TRITON_INTERPRET", None)
DEVICE = torch.device("cuda")
D, F, EXPERTS, LAYERS, K = 2880, 32, 6, 24, 4
LONGEST = 60e-6  # seconds of a handshake; about 10 are usual, shared machines are slower


def narrow() -> list[CpuExperts]:
    """Experts of gpt-oss-20b's width with little to compute, so that the way there shows."""
    pool, layers = native.lib().Pool(4), []
    for seed in range(LAYERS):
        rng = np.random.default_rng(seed)
        matrices = [
            SplitMatrices(
                name, GGMLType.Q8_0,
                np.stack([random_blocks(GGMLType.Q8_0, *size, rng) for _ in range(EXPERTS)]),
            )
            for name, size in {"gate": (F, D), "up": (F, D), "down": (D, F)}.items()
        ]  # fmt: skip
        layers.append(CpuExperts(pool, tuple(matrices)))
    return layers


@pytest.fixture(scope="module")
def banks() -> list[CpuExperts]:
    return narrow()


class Step:
    """A recorded step through all layers of a desk; each gets the same hidden states."""

    def __init__(self, banks: list[CpuExperts], tokens: int, limit_ms: int = 20_000) -> None:
        self.desk, self.tokens = Desk(DEVICE, banks, 16, K), tokens
        self.hidden = torch.zeros(tokens, D, device=DEVICE)
        self.ids = torch.zeros(tokens, K, dtype=torch.int32, device=DEVICE)
        self.weights = torch.ones(tokens, K, device=DEVICE)
        self.table = torch.full((EXPERTS,), -1, dtype=torch.int32, device=DEVICE)
        self.limit_ms = limit_ms
        self.set(0)
        self.run(self.launch)  # compiles
        made: Any = torch.cuda.CUDAGraph
        self.graph = made()
        with torch.cuda.graph(self.graph):  # type: ignore[no-untyped-call]
            self.out = self.launch()

    def launch(self) -> torch.Tensor:
        outs = []
        for layer in range(LAYERS):
            self.desk.send(layer, self.hidden, self.ids, self.weights, self.table)
            box = self.desk.box(layer)
            outs.append(collect(box, self.tokens, self.desk.state, limit_ms=self.limit_ms))
        return torch.stack(outs)

    def set(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.hidden.copy_(torch.randn(self.tokens, D, generator=generator))
        rows = [torch.randperm(EXPERTS, generator=generator)[:K] for _ in range(self.tokens)]
        self.ids.copy_(torch.stack(rows))
        self.weights.copy_(torch.rand(self.tokens, K, generator=generator))

    def run(self, launch: Any) -> None:
        self.desk.begin(self.tokens)
        launch()
        self.desk.finish()
        torch.cuda.synchronize()

    def best(self, count: int = 100) -> tuple[float, float]:
        """Of the replay with the shortest handshake, which nobody disturbed: seconds a layer that
        the handshake took, and that the CPU computed."""
        found = []
        for _ in range(count):
            before = sum(s["compute_ns"] for s in self.desk._native.stats())
            begin = time.perf_counter()
            self.run(self.graph.replay)
            whole = time.perf_counter() - begin
            after = sum(s["compute_ns"] for s in self.desk._native.stats())
            computed = (after - before) / 1e9
            found.append(((whole - computed) / LAYERS, computed / LAYERS))
        return min(found)

    def wanted(self) -> torch.Tensor:
        parts = [part.cpu() for part in (self.hidden, self.ids, self.weights)]
        return torch.stack([cpu(*parts) for cpu in self.desk.layers])


def test_the_trial_finds_nothing(banks) -> None:
    assert trial(DEVICE, banks[0]) == ""


@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_every_replay_brings_the_numbers_of_its_own_step(banks, tokens: int) -> None:
    step = Step(banks, tokens)
    for seed in range(1, 100):
        step.set(seed)
        step.run(step.graph.replay)
        assert torch.equal(step.out.cpu(), step.wanted()), seed


@pytest.mark.parametrize("tokens", [1, 4])
def test_a_handshake_takes_microseconds(banks, tokens: int) -> None:
    """Steps in which the CPU has little to compute: what it takes for more of it varies more, from
    run to run, than the handshake is long."""
    step = Step(banks, tokens)
    handshake, computed = step.best()
    step.table.zero_()  # all have slots
    nothing = step.best()[0]
    print(
        f"\n{tokens} tokens, a layer: the handshake {1e6 * handshake:.1f} us, the CPU's part "
        f"{1e6 * computed:.1f}; without misses {1e6 * nothing:.1f} us"
    )
    assert handshake < LONGEST
    assert nothing < LONGEST / 2


class Stuck:
    """A native thread that does nothing."""

    def begin(self, number: int, tokens: int) -> None: ...

    def wait(self, seconds: float) -> bool:
        time.sleep(seconds)
        return False

    def cancel(self) -> None: ...


def test_a_stuck_worker_is_an_error_and_the_next_step_succeeds(banks) -> None:
    step = Step(banks, 1)
    step.set(3)
    answering, step.desk._native = step.desk._native, Stuck()
    step.desk.begin(1)
    begin = time.monotonic()
    step.graph.replay()
    with pytest.raises(NativeError, match="did not answer the device"):
        step.desk.finish(0.3)
    torch.cuda.synchronize()
    assert time.monotonic() - begin < 3
    step.desk._native = answering
    step.run(step.graph.replay)
    assert torch.equal(step.out.cpu(), step.wanted())


def test_the_device_gives_up_by_itself(banks) -> None:
    step = Step(banks, 1, limit_ms=200)
    step.desk._native = Stuck()
    step.desk.begin(1)
    begin = time.monotonic()
    step.graph.replay()
    torch.cuda.synchronize()
    assert 0.15 < time.monotonic() - begin < 2  # one layer's wait, not those of all
    assert int(step.desk.state[2]) == step.desk._number
    assert (step.out == 0).all()


def test_a_model_survives_a_stuck_worker(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "model.gguf"
    write_synthetic(Synthesis(shape_of("gpt-oss-20b-tiny", 2)), path)
    params = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
    options = {"context_length": 256, "max_sequences": 1, "prefix_cache": False}
    with LLM(path, backend="cuda", **options) as llm:
        backend = llm.engine.model.backend
        for bank in backend._beside:  # no budget would make so small a model need the CPU
            bank.slots = None
        wanted = llm.generate([[5, 6, 7]], params)[0].token_ids
        assert llm.engine.model.graphs._graphs
        desk = backend._courier._desk
        answering, desk._native = desk._native, Stuck()
        monkeypatch.setattr(rendezvous, "CHECK", 0.1)
        monkeypatch.setattr(Desk.finish, "__defaults__", (0.3,))
        with pytest.raises(NativeError, match="did not answer the device"):
            llm.generate([[5, 6, 7]], params)
        desk._native = answering
        assert llm.generate([[5, 6, 7]], params)[0].token_ids == wanted
