"""Files in 16-bit floats and quantised types: each backend against what the file holds, and both
against the reference model the file was made from."""

from pathlib import Path

import pytest
import torch

from greenroom.gguf import GGUFFile
from greenroom.models import LoadOptions, Model, load_model

from .cases import CASES, MAIN
from .hf_export import VOCABULARY, Tiny, rounded
from .sessions import one_pass, prompt, relative_error

TYPES = ("F16", "BF16", "Q8_0")
TOKENS = prompt(11, 64, VOCABULARY)
# Against the reference model both backends show what rounding the weights for the file does; at
# 1.2 that alone is up to 3e-3 in Q8_0. SparseMixer's thresholds turn it into other routes sooner.
GAIN = {"phi-3.5-moe": 0.7}
USUAL_GAIN = 1.0
HOT = 1.2


def load(path: Path, case: str, backend: str) -> Model:
    with GGUFFile(path) as file:
        options = {"backend": backend, "threads": 2} | CASES[case].options
        return load_model(file, LoadOptions(**options))


def divergence(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """KL(expected || found) at each position, in nats."""
    p, q = (torch.log_softmax(x.double(), -1) for x in (expected, found))
    return (p.exp() * (p - q)).sum(-1)


@pytest.fixture(scope="module", params=MAIN)
def wide(request: pytest.FixtureRequest) -> tuple[str, Tiny]:
    case = CASES[request.param]
    return request.param, case.make_wide(GAIN.get(request.param, USUAL_GAIN))


@pytest.mark.parametrize("type", TYPES)
def test_the_reference_backend_computes_what_the_file_holds(
    wide: tuple[str, Tiny], type: str, tmp_path: Path
) -> None:
    case, tiny = wide
    tiny.write(tmp_path / "quantised.gguf", type)
    tiny.write(tmp_path / "plain.gguf", overrides=rounded(tiny.tensors, type))
    found, expected = (
        one_pass(load(tmp_path / name, case, "reference"), TOKENS)
        for name in ("quantised.gguf", "plain.gguf")
    )
    assert relative_error(found, expected) < 1e-6


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_quantised_files_stay_close_to_the_reference(
    wide: tuple[str, Tiny], type: str, backend: str, tmp_path: Path
) -> None:
    case, tiny = wide
    model = load(tiny.write(tmp_path / "model.gguf", type), case, backend)
    found, expected = one_pass(model, TOKENS), tiny.logits(TOKENS)
    mean = float(divergence(found, expected).mean())
    print(f"{case} {type} {backend}: mean KL {mean:.1e}")
    assert mean < 1e-3


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("case", MAIN)
def test_native_kernels_compute_what_the_file_holds(case: str, type: str, tmp_path: Path) -> None:
    path = CASES[case].make_wide(HOT).write(tmp_path / "model.gguf", type)
    found, expected = (
        one_pass(load(path, case, backend), TOKENS) for backend in ("native", "reference")
    )
    divergences = divergence(found, expected)
    print(f"{case} {type}: median KL {divergences.median():.1e}, mean {divergences.mean():.1e}")
    assert divergences.median() < (1e-6 if type == "Q8_0" else 1e-10)
    assert divergences.mean() < 1e-3  # a route that flips at a near tie is one of 64 positions
