"""Predictions beside measurements, and the line through two tiny models, worked by hand."""

import pytest

from greenroom.bench import prediction
from greenroom.bench.ceilings import output_seconds
from greenroom.placement.calibrate import MachineProfile
from greenroom.placement.placement import Placement
from greenroom.placement.work import Work


def test_the_line_through_two_models() -> None:
    assert prediction.line((10, 3.0), (30, 7.0)) == (1.0, 0.2)
    assert prediction.line((10, 3.0), (30, 2.0)) == (3.0, 0.0)  # noise: no negative time


def test_errors_are_relative_to_what_was_measured() -> None:
    machine = MachineProfile(
        fingerprint="f", name="m", date="-", threads=1, ram=1, dram={1: 10.0}, dense={"X": 10.0},
    )  # fmt: skip
    work = Work(
        experts={}, dense={"X": 10**9}, expert_values={}, dense_values={"X": 10**9}, share=0.0,
        count=0, layers=0, cache=0,
    )  # fmt: skip
    case = {"prompt": 100, "batch": 1, "generate": 4, "decode": {"median": 8.0}, "prefill": None}
    place = {"backend": "native", "reason": "", "layers": 2}
    document = {"results": {"greenroom": {"placement": place, "cases": {"a": case}}}}
    prediction.add_predictions(document, work, machine)
    # 1 GB at 10 GB/s: 10 tokens per second, 8 were measured
    assert case["predicted"] == {
        "decode": {"rate": pytest.approx(10), "error": pytest.approx(0.25)}
    }
    assert Placement(**place).layers == 2


def test_a_number_costs_what_narrow_matrices_take_longer() -> None:
    # an operation takes 1 us and a number 3 us: 4 operations each give 1.75 us an operation, 2 give
    # 2.5 us
    assert output_seconds((4.0, 2.0), (1 / 1.75e-6, 1 / 2.5e-6)) == pytest.approx(3e-6)
    assert output_seconds((4.0, 2.0), (1.0, 2.0)) == 0.0  # noise
