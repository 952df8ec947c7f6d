"""Experts that a GPU is predicted to read over the bus in a short step, worked by hand."""

import subprocess
import sys
from dataclasses import replace

import pytest

from greenroom.experts.limits import BESIDE_STAGED
from greenroom.placement import guests, predict
from greenroom.placement.calibrate import save_profile
from greenroom.placement.cpu_seconds import CpuSeconds
from greenroom.placement.placement import Placement
from greenroom.placement.work import Work

from .profiles import GPU

# An expert of 100 MB takes the CPU 2 ms at any number of tokens, and the bus 2 ms.
MACHINE = replace(GPU, experts_batch={"X": 9e6})
WORK = Work(
    experts={"X": 10 * 10**9}, dense={}, expert_values={"X": 20 * 10**9}, dense_values={},
    share=0.4, count=10, layers=10, cache=0,
)  # fmt: skip
PLACE = Placement(
    "cuda", "", layers=10, layers_on_gpu=10, head_on_gpu=True, staging=10**9, prefill_chunk=512
)
READ = 2e-3 / 0.85  # by the GPU, where it lies
# Of a layer by experts that have no slot: one is the CPU's, which takes 17 us to meet; of two one
# is read, 15 us after the CPU begins; of three also, and slows the CPU by a tenth as long as it
# takes; of four two are.
ONE, TWO, FOUR = 2.017e-3, READ + 15e-6, 2 * READ + 15e-6
THREE = 4.017e-3 + 0.1 * (READ + 15e-6) / 1.1
SHORT = 43e-6  # kernels


def test_four_experts_of_a_token_are_shared_out() -> None:
    found = predict.decode(WORK, PLACE, MACHINE, 0)
    assert found.rate == pytest.approx(1 / (10 * (FOUR + SHORT)))
    assert found.bound == "experts from RAM"
    assert found.parts["handshakes"] == pytest.approx(10 * 11e-6)
    # without memory for them or a bus, the CPU computes all and is met
    rate = pytest.approx(1 / (10 * (8e-3 + 11e-6 + SHORT)))
    assert predict.decode(WORK, replace(PLACE, staging=0), MACHINE, 0).rate == rate
    assert predict.decode(WORK, PLACE, replace(MACHINE, pcie_up={}), 0).rate == rate


def test_experts_with_slots_leave_fewer_to_share() -> None:
    # in 1, 4, 6, 4 and 1 of 16 cases none, one ... four have no slot; each has 11 us of bells
    found = predict.decode(WORK, replace(PLACE, slots=50), MACHINE, 0)
    layer = (11e-6 + 4 * ONE + 6 * TWO + 4 * THREE + FOUR) / 16
    assert found.rate == pytest.approx(1 / (10 * (layer + SHORT)))
    # with all in slots 4 GB are read from VRAM
    found = predict.decode(WORK, replace(PLACE, slots=100), MACHINE, 0)
    assert found.rate == pytest.approx(1 / (0.004 + 10 * SHORT))


def test_experts_of_several_tokens_are_copied_as_far_as_there_is_room() -> None:
    # Two tokens with five of ten experts each meet 7.5, taken as eight: of five they are one, of
    # three both. Four are copied and read by 7 routes, 0.1 ms each, in 8.715 ms; the CPU takes 8 ms
    # and a tenth of 8.715 / 1.1 more, and 17 us to meet
    work = replace(WORK, share=0.5)
    assert guests.room_of(work, 10**9) == 7  # the matrices of one are expanded in 267 MB
    found = predict.decode(work, PLACE, MACHINE, 0, batch=2)
    layer = 8.017e-3 + 0.1 * 8.715e-3 / 1.1
    assert found.rate == pytest.approx(2 / (10 * (layer + SHORT)))
    tight = replace(PLACE, staging=266_666_666 + 3 * 10**8 + BESIDE_STAGED * 10)
    found = predict.decode(work, tight, MACHINE, 0, batch=2)
    layer = 10.017e-3 + 0.1 * (3 * 2e-3 + 6 * 1e-4 + 15e-6) / 1.1
    assert found.rate == pytest.approx(2 / (10 * (layer + SHORT)))
    # longer steps have none
    long, without = (
        predict.decode(work, p, MACHINE, 0, 33) for p in (PLACE, replace(PLACE, staging=0))
    )
    assert long == without


def test_a_pace_is_that_of_the_cpus_tiles() -> None:
    # 32 tokens with all of ten experts: two tiles of 16, 0.32 s each over 20e9 weights, and 0.2 s
    # of reading beside the first; 3,100 rows beside the first of each of 100 experts, 0.2 s
    machine = replace(MACHINE, experts_batch={"X": 2000.0})
    pace = guests.pace_of(CpuSeconds(machine, replace(WORK, share=1.0)))
    assert pace.expert == pytest.approx(2e-3)
    assert pace.row == pytest.approx((0.32 + (0.32**3 + 0.2**3) ** (1 / 3) - 0.2) / 3100)
    assert pace.route == pytest.approx(1e-4)
    assert (pace.copy, pace.guest) == pytest.approx((2e-3, READ))


def test_a_roofline_has_cpu_and_bus_read_all_the_time() -> None:
    # 4 GB at 50 GB/s each
    found = predict.decode(WORK, PLACE, MACHINE, 0, hits=0.0)
    assert found.rate == pytest.approx(1 / 0.04)
    found = predict.decode(WORK, PLACE, MACHINE, 0, hits=0.75)
    assert found.rate == pytest.approx(1 / 0.01)


def test_a_plan_with_guests_waits_for_no_torch(tmp_path) -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['triton'] = None\n"  # importing them fails
        "from greenroom.commands import main\n"
        "sys.exit(main(['plan', 'gpt-oss-20b', '--vram', '4GiB', '--machine', sys.argv[1]]))"
    )
    path = str(save_profile(MACHINE, tmp_path / "machine.json"))
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "experts from RAM" in done.stdout
