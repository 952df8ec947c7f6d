"""The kernel benchmark runs, compares with the right ceilings, and ends with one JSON document."""

import dataclasses
import json

import pytest

from greenroom import native
from greenroom.bench import kernels
from greenroom.commands.bench_kernels import bench_kernels
from greenroom.errors import RequestError


@pytest.fixture(scope="module")
def document() -> tuple[list[str], dict]:
    lines: list[str] = []
    plan = kernels.Plan(("MXFP4", "BF16"), native.usable_tiers()[-1:], (1, 64), 2, 96, 2)
    return lines, kernels.run(plan, lines.append)


def test_last_line_is_the_document(document) -> None:
    lines, found = document
    assert json.loads(lines[-1]) == json.loads(json.dumps(found))
    assert "ceilings" in lines[1]


def test_every_combination_is_there(document) -> None:
    _, found = document
    keys = {(f["operation"], f["format"], f["tokens"]) for f in found["figures"]}
    assert keys == {
        (o, n, t) for o in ("moe", "linear") for n in ("MXFP4", "BF16") for t in (1, 64)
    }


def test_fractions_follow_from_the_ceilings(document) -> None:
    _, found = document
    limits = found["ceilings"][0]
    for f in found["figures"]:
        if f["tokens"] == 1:
            assert f["of"] == "read"
            assert f["fraction"] == pytest.approx(f["gigabytes"] / max(limits["read"].values()))
        elif f["of"] == "int8":
            assert f["fraction"] == pytest.approx(f["gigaops"] / limits["int8"])
        assert 0 < f["gigabytes"] < 10_000


def test_expert_bytes_are_the_slabs(document) -> None:
    """One token's bytes over its operations is the format's size: 4.25 bits for MXFP4."""
    _, found = document
    f = next(f for f in found["figures"] if f["format"] == "MXFP4" and f["operation"] == "moe")
    assert f["gigabytes"] / f["gigaops"] == pytest.approx(4.25 / 8 / 2, rel=0.01)


def test_plans() -> None:
    assert set(kernels.full_plan(4).formats) == set(kernels.FORMATS)
    assert kernels.full_plan(4).repeats >= 5
    assert dataclasses.replace(kernels.quick_plan(3)).threads == 3


def test_unknown_names_are_named() -> None:
    with pytest.raises(RequestError, match="Q9"):
        bench_kernels(formats="Q9")
    with pytest.raises(RequestError, match="avx1024"):
        bench_kernels(tiers="avx1024")
