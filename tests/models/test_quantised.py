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
GAIN = 0.7  # hotter random weights lie so near to ties that any rounding changes routes


def load(path: Path, case: str, backend: str) -> Model:
    with GGUFFile(path) as file:
        options = {"backend": backend, "threads": 2} | CASES[case].options
        return load_model(file, LoadOptions(**options))


def mean_divergence(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Mean KL(expected || found) over the positions, in nats."""
    p, q = (torch.log_softmax(x.double(), -1) for x in (expected, found))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.fixture(scope="module", params=MAIN)
def wide(request: pytest.FixtureRequest) -> tuple[str, Tiny]:
    return request.param, CASES[request.param].make_wide(GAIN)


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
    divergence = mean_divergence(found, expected)
    print(f"{case} {type} {backend}: mean KL {divergence:.1e}")
    assert divergence < 1e-3
