"""On a CUDA device: logits against the float32 CPU engine, the same text every time."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from greenroom import LLM, SamplingParams
from greenroom.convert.synth import Synthesis, write_synthetic
from greenroom.convert.synth_shapes import shape_of

pytestmark = pytest.mark.gpu

os.environ.pop("TRITON_INTERPRET", None)
SHAPES = ("gpt-oss-20b-tiny", "phi-3.5-moe-tiny", "deepseek-moe-16b-tiny", "qwen3-30b-a3b-tiny")
TOKENS = np.random.default_rng(0).integers(0, 300, 200).tolist()


@pytest.fixture(scope="module", params=SHAPES)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("synth") / "model.gguf"
    write_synthetic(Synthesis(shape_of(request.param, 2)), file)
    return file


def log_softmax(logits: np.ndarray) -> torch.Tensor:
    return torch.log_softmax(torch.from_numpy(logits).double(), -1)


@pytest.mark.parametrize("chunk", [512, 48])
def test_logits_equal_those_of_the_cpu_in_float32(path: Path, chunk: int) -> None:
    found = {}
    for backend in ("reference", "cuda"):
        options = {"context_length": 256, "prefill_chunk": chunk, "max_sequences": 1}
        with LLM(path, backend=backend, **options) as llm:
            assert llm.engine.config.backend == backend
            found[backend] = log_softmax(llm.logits(TOKENS))
    p, q = found["reference"], found["cuda"]
    divergence = (p.exp() * (p - q)).sum(-1)
    same = (p.argmax(-1) == q.argmax(-1)).double().mean()
    print(f"mean KL {divergence.mean():.1e}, largest {divergence.max():.1e}, same {same:.4f}")
    assert divergence.mean() < 1e-3
    assert same >= 0.99


def test_the_same_text_every_time_and_in_a_batch(path: Path) -> None:
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    with LLM(path, backend="cuda", context_length=256, prefix_cache=False) as llm:
        prompts = [TOKENS[:7], TOKENS[:60], TOKENS[20:21]]
        first, again = (llm.generate(prompts, params) for _ in range(2))
        assert [c.token_ids for c in first] == [c.token_ids for c in again]
        assert all(len(c.token_ids) == 12 for c in first)


def test_replayed_graphs_give_the_text_of_plain_steps(path: Path) -> None:
    """All experts in VRAM, so that steps can be recorded; several sequences of mixed lengths."""
    params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
    prompts = [TOKENS[:7], TOKENS[:60], TOKENS[20:21]]
    texts = []
    with LLM(path, backend="cuda", context_length=256, prefix_cache=False) as llm:
        model = llm.engine.model
        graphs = model.graphs
        for used in (graphs, None):
            model.graphs = used
            texts.append([c.token_ids for c in llm.generate(prompts, params)])
        if not model.waits:
            assert graphs.usable
            assert graphs._graphs
    assert texts[0] == texts[1]
