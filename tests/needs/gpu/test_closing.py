"""On a CUDA device: a closed model leaves its VRAM to the next one, whoever still knows it."""

import os
from pathlib import Path

import pytest
import torch

from greenroom import LLM, SamplingParams
from greenroom.convert.synth import Synthesis, write_synthetic
from greenroom.convert.synth_shapes import shape_of

pytestmark = pytest.mark.gpu

os.environ.pop("TRITON_INTERPRET", None)


def test_vram_of_closed_models_is_free(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_synthetic(Synthesis(shape_of("gpt-oss-20b-tiny", 2)), path)
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    closed, texts, held, free = [], set(), [], []
    for _ in range(4):
        llm = LLM(path, backend="cuda", context_length=1 << 16, max_sequences=2)
        found = llm.generate([[5] * 200, [6, 7]], params)  # long steps, recorded ones
        texts.add(tuple(answer.token_ids for answer in found))
        used = torch.cuda.memory_allocated()
        llm.close()
        closed.append(llm)
        held.append(torch.cuda.memory_allocated())
        assert used - held[-1] > 1 << 20
        free.append(torch.cuda.mem_get_info()[0])
    print(f"\nheld {[h >> 20 for h in held]} MiB, free {[f >> 20 for f in free]} MiB")
    assert len(texts) == 1
    assert max(held) < 40 << 20  # workspaces of libraries
    assert held[-1] <= held[0]
