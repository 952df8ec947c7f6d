"""On a GPU: whatever the budget, the peak stays below it and the answer is the CPU's."""

import pytest
import torch

from greenroom import LLM, SamplingParams
from greenroom.convert.synth import Synthesis, write_synthetic
from greenroom.convert.synth_shapes import shape_of

pytestmark = pytest.mark.gpu

MIB = 1 << 20
PROMPT = list(range(100, 420))


@pytest.fixture(scope="module", params=["gpt-oss-20b-tiny", "deepseek-moe-16b-tiny"])
def path(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("budgets") / "model.gguf"
    write_synthetic(Synthesis(shape_of(request.param)), path)
    return path


@pytest.mark.parametrize("budget", [0, 120, 140, 192, 256, 512, 1024, 4096])
def test_the_peak_stays_below_the_budget(path, budget: int) -> None:
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    options = {"context_length": 1024, "max_sequences": 1}
    with LLM(path, vram=0, **options) as cpu:
        wanted = cpu.logits(PROMPT[:64])
    with LLM(path, vram=budget * MIB, **options) as llm:
        found = llm.logits(PROMPT[:64])
        assert len(llm.generate([PROMPT], params)[0].token_ids) == 8
        used = llm.engine.stats().get("vram")
    p, q = (torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (wanted, found))
    assert float((p.exp() * (p - q)).sum(-1).mean()) < 1e-3
    if used is not None:
        assert used["booked"] <= used["peak_reserved"] <= budget * MIB
