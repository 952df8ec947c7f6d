"""Frequencies against transformers and published numbers; the two pairings against each other."""

import math
from types import SimpleNamespace

import pytest
import torch

from greenroom.layers.rope import Rope, Yarn, inverse_frequencies, rotate

# gpt-oss: 64 channels, base 150000, original 4096, factor 32: un-rounded (publisher) and
# rounded (llama.cpp).
GPT_OSS = {
    0: (1.0, 1.0),
    1: (6.890443059e-01, 6.890443059e-01),
    8: (5.081327482e-02, 5.081327482e-02),
    9: (3.170569618e-02, 3.162075228e-02),
    12: (6.794959490e-03, 7.015713911e-03),
    16: (4.564839192e-04, 5.809475019e-04),
    17: (1.293187012e-04, 2.279477958e-04),
    18: (3.830881237e-05, 3.830881237e-05),
    31: (3.023511428e-07, 3.023511428e-07),
}


@pytest.mark.parametrize("rounded", [False, True])
def test_yarn_of_gpt_oss_equals_the_published_numbers(rounded: bool) -> None:
    yarn = Yarn(32.0, 4096, rounded=rounded)
    found = yarn.apply(inverse_frequencies(64, 150000.0), 150000.0)
    for index, values in GPT_OSS.items():
        assert float(found[index]) == pytest.approx(values[rounded], rel=1e-8)
    assert yarn.magnitude == pytest.approx(1.3465735902799727, rel=1e-12)


@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize("factor", [1.5, 4.0, 40.0])
@pytest.mark.parametrize("rotated", [20, 64, 128])
def test_yarn_equals_transformers(rotated: int, factor: float, truncate: bool) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": factor,
        "original_max_position_embeddings": 2048,
        "truncate": truncate,
    }
    config = SimpleNamespace(
        rope_parameters=parameters,
        head_dim=rotated,
        hidden_size=rotated,
        num_attention_heads=1,
        max_position_embeddings=int(2048 * factor),
        standardize_rope_params=lambda: None,
    )
    expected, magnitude = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    yarn = Yarn(factor, 2048, rounded=truncate)
    found = yarn.apply(inverse_frequencies(rotated, 10000.0), 10000.0)
    torch.testing.assert_close(found.float(), expected, rtol=2e-6, atol=0)
    assert yarn.magnitude == pytest.approx(magnitude)


def test_permuted_rows_in_adjacent_pairs_equal_halves() -> None:
    x = torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 1, 2, 500, 100_000])
    neox = Rope(inverse_frequencies(16, 10000.0), 1.2, neox=True)
    angles = neox.angles(positions)
    halves = rotate(x, angles, neox=True)
    adjacent = rotate(x.view(5, 3, 2, 8).transpose(2, 3).reshape(5, 3, 16), angles, neox=False)
    back = adjacent.view(5, 3, 8, 2).transpose(2, 3).reshape(5, 3, 16)
    torch.testing.assert_close(back, halves, rtol=0, atol=0)


@pytest.mark.parametrize("neox", [True, False])
def test_a_rotation_turns_by_position_times_frequency(neox: bool) -> None:
    rope = Rope(torch.tensor([0.5, 0.25]), 2.0, neox)
    x = torch.zeros(1, 1, 6)
    x[0, 0, 0] = 1.0
    out = rotate(x, rope.angles(torch.tensor([3])), neox)[0, 0]
    partner = 2 if neox else 1
    assert float(out[0]) == pytest.approx(2 * math.cos(1.5))
    assert float(out[partner]) == pytest.approx(2 * math.sin(1.5))
    assert out[4:].tolist() == [0.0, 0.0]  # beyond the rotated channels nothing changes


def test_channels_beyond_the_rotated_pass_through() -> None:
    x = torch.randn(2, 2, 10, generator=torch.Generator().manual_seed(1))
    rope = Rope(inverse_frequencies(4, 10000.0), 1.3, neox=True)
    out = rotate(x, rope.angles(torch.tensor([7, 8])), True)
    assert torch.equal(out[..., 4:], x[..., 4:])
    assert not torch.equal(out[..., :4], x[..., :4])


def test_angles_keep_their_phase_at_long_positions() -> None:
    position = 131_071
    rope = Rope(inverse_frequencies(64, 150000.0), 1.0, neox=True)
    cosine, sine = rope.angles(torch.tensor([position]))[0]
    for i in range(32):
        angle = position * float(rope.frequencies[i])
        assert float(cosine[i]) == pytest.approx(math.cos(angle), abs=1e-6)
        assert float(sine[i]) == pytest.approx(math.sin(angle), abs=1e-6)
