"""Profiles survive the disk, are refused when damaged, and belong to one machine."""

import json
from dataclasses import replace

import pytest

from greenroom.placement import calibrate
from greenroom.placement.calibrate import MachineProfile, ProfileError
from greenroom.placement.machine import machine
from greenroom.placement.problems import busy, problems

PROFILE = MachineProfile(
    fingerprint="f" * 16,
    name="a processor",
    date="2026-01-01T00:00:00+00:00",
    threads=2,
    ram=1 << 34,
    dram={1: 10.0, 2: 18.0},
    experts={"MXFP4": 15.0, "Q8_0": 12.0},
    pcie_up={1: 20.0, 64: 50.0},
)


def test_a_profile_survives_the_disk(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("GREENROOM_HOME", str(tmp_path))
    path = calibrate.save_profile(PROFILE)
    assert calibrate.load_profile(path) == PROFILE
    assert calibrate.saved_profile(PROFILE.fingerprint) == PROFILE
    assert calibrate.saved_profile("0" * 16) is None


def test_rates_of_formats_that_were_not_measured() -> None:
    assert (PROFILE.dram_best, PROFILE.pcie) == (18, 50)
    assert PROFILE.rate(PROFILE.experts, "MXFP4") == 15
    assert PROFILE.rate(PROFILE.experts, "Q2_K") == 12  # the slowest that was measured
    assert PROFILE.rate(PROFILE.dense, "Q4_K") == 18  # none was: the ceiling
    assert PROFILE.rate({"F32": 3.0, "Q8_0": 9.0}, "Q4_K") == 9  # float32 is no measure for it


def test_a_file_of_an_earlier_version_is_read(tmp_path) -> None:
    path, earlier = tmp_path / "m.json", PROFILE.json()
    tiles = ("tile_one", "tile_two", "tile_four", "tile_eight")
    for name in ("reads", *tiles, "attention_wide", "token_seconds"):
        del earlier[name]
    path.write_text(json.dumps({**earlier, "dense_few": {"Q8_0": 9.0}, "dense_batch": {}}))
    assert calibrate.load_profile(path) == PROFILE


def test_small_models_are_read_at_the_rate_of_the_cache() -> None:
    profile = replace(PROFILE, reads={16: 40.0, 64: 20.0})
    rates = [profile.read_rate(mib << 20) for mib in (1, 16, 32, 64, 999)]
    # in the middle of the logarithms a byte takes the mean: 1 / 40 and 1 / 20
    assert rates == pytest.approx([40, 40, 2 / (1 / 40 + 1 / 20), 20, 20])
    assert PROFILE.read_rate(1 << 20) == 18  # not measured


def test_attention_from_heads_of_two_widths() -> None:
    # A query and a key of 64 numbers take 2 ns, of 128 3 ns: 1/256 ns for each of 256 more
    # operations, 1 ns besides. The measured prompt scored 288.5 keys for the 256.5 that count.
    useful = 256.5 / 288.5
    half = replace(PROFILE, attention_prompt=256 * useful / 2)
    assert half.score_seconds == pytest.approx((2e-9 / 256, 0))
    profile = replace(half, attention_wide=512 * useful / 3)
    assert profile.score_seconds == pytest.approx((1e-9 / 256, 1e-9))
    assert profile.key_seconds == (0, 0)
    # A step's key with 4 queries: 8 and 40 ns, 12 and 60 ns: 20 ns for 256 more bytes, 20 besides
    profile = replace(profile, attention_step=4 * 256 / 48, attention_step_wide=4 * 512 / 72)
    assert profile.key_seconds == pytest.approx((20e-9, 20e-9 / 256))
    profile = replace(profile, attention_step_wide=0.0)
    assert profile.key_seconds == pytest.approx((0, 40e-9 / 256))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"version": 99}, "version 99"),
        ({"kind": "x"}, "not a document"),
        ({"dram": {"two": 1}}, "invalid literal"),
        ({"dram": {"2": -1}}, "dram must be a rate"),
        ({"vram": "fast"}, "vram must be a rate"),
        ({"threads": 1.5}, "threads must be a whole number"),
        ({"surprise": 1}, "'surprise' is unknown"),
    ],
)
def test_a_wrong_profile_is_refused_in_one_line(tmp_path, change, complaint) -> None:
    path = tmp_path / "m.json"
    path.write_text(json.dumps({**PROFILE.json(), **change}))
    with pytest.raises(ProfileError, match=complaint) as caught:
        calibrate.load_profile(path)
    assert "\n" not in str(caught.value)


def test_no_json_is_refused(tmp_path) -> None:
    (tmp_path / "m.json").write_text("{")
    with pytest.raises(ProfileError, match="no JSON"):
        calibrate.load_profile(tmp_path / "m.json")
    with pytest.raises(ProfileError, match="cannot be read"):
        calibrate.load_profile(tmp_path / "none.json")


def test_problems_are_named_with_their_fix() -> None:
    here = machine()
    slow = replace(
        here,
        adapters=1,
        gpus=(),
        memory=replace(here.memory, huge_pages="never", memlock=64 << 10),
        processor=replace(here.processor, cores=8, quota=2.0),
    )
    found = {problem.what: problem.fix for problem in problems(slow)}
    text = " ".join([*found, *found.values()])
    for word in ("NVIDIA", "huge pages are off", "64 KiB", "2 of 8 cores", "ulimit"):
        assert word in text
    assert problems(slow)[0].grave
    assert here.fingerprint == replace(here, memory=slow.memory).fingerprint
    assert here.fingerprint != slow.fingerprint


def test_programs_beside_a_measurement_are_a_problem() -> None:
    assert busy(0.4, 2) == []
    (note,) = busy(0.6, 2)
    assert (note.grave, note.what) == (
        False, "other programs kept 0.6 of 2 processors busy before it measured"
    )  # fmt: skip
    assert busy(1.5, 2)[0].grave
