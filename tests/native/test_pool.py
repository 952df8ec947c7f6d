"""The thread pool: every task exactly once, whatever the number of threads and processors;
failures come back to the caller; the advice on its size follows the machine's limits."""

import os
import threading
import time
from pathlib import Path
from types import ModuleType

import pytest

from greenroom import native


@pytest.fixture(params=native.usable_tiers())
def lib(request: pytest.FixtureRequest) -> ModuleType:
    return native.module(request.param)


@pytest.mark.parametrize("threads", [1, 2, 3, 8, 32])
@pytest.mark.parametrize("tasks", [1, 2, 7, 100])
def test_every_task_runs_exactly_once(lib: ModuleType, threads: int, tasks: int) -> None:
    pool = lib.Pool(threads)
    assert pool.size == threads
    assert pool._exercise(regions=300, tasks=tasks) > 0  # raises if a task is lost or doubled


@pytest.mark.parametrize("spin_us", [0, 1, 50])
def test_regions_after_sleep(lib: ModuleType, spin_us: int) -> None:
    pool = lib.Pool(4, spin_us=spin_us)
    for pause in (0.0, 0.0002, 0.002) * 20:
        pool._exercise(regions=3, tasks=50)
        pool._exercise_each(regions=2)
        time.sleep(pause)


def test_roused_workers_spin_again(lib: ModuleType) -> None:
    pool, used = lib.Pool(2, spin_us=50_000), 0.0
    pool._exercise_each(regions=1)
    for _ in range(20):  # a busy machine may run the worker before or after, but not every time
        time.sleep(0.1)  # asleep by now
        before = time.process_time()
        pool.rouse()
        time.sleep(0.1)
        used = max(used, time.process_time() - before)
        if used > 0.005:
            break
    assert used > 0.005
    assert pool._exercise(regions=10, tasks=10) > 0


def test_rousing_disturbs_no_region(lib: ModuleType) -> None:
    pool, over = lib.Pool(4, spin_us=0), threading.Event()
    thread = threading.Thread(target=lambda: [pool.rouse() for _ in iter(over.is_set, True)])
    thread.start()
    try:
        for _ in range(100):
            pool._exercise(regions=5, tasks=9)
            pool._exercise_each(regions=1)
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_each_runs_all_threads_at_the_same_time(lib: ModuleType, threads: int) -> None:
    assert lib.Pool(threads)._exercise_each(regions=200) > 0


def test_each_and_run_alternate(lib: ModuleType) -> None:
    pool = lib.Pool(4)
    for _ in range(200):
        pool._exercise(regions=1, tasks=3)
        pool._exercise_each(regions=1)


def test_create_and_destroy(lib: ModuleType) -> None:
    before = len(os.listdir("/proc/self/task"))
    for i in range(100):
        pool = lib.Pool(1 + i % 6)
        if i % 2:
            pool._exercise(regions=2, tasks=4)
        del pool
    assert len(os.listdir("/proc/self/task")) <= before


def test_callers_take_turns(lib: ModuleType) -> None:
    pool = lib.Pool(3)
    errors: list[Exception] = []

    def call() -> None:
        try:
            pool._exercise(regions=500, tasks=6)
        except Exception as error:
            errors.append(error)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not errors


@pytest.mark.parametrize("threads", [1, 4])
def test_failure_reaches_the_caller_and_the_pool_lives_on(lib: ModuleType, threads: int) -> None:
    pool = lib.Pool(threads)
    for failing in (0, 3, 19):
        with pytest.raises(ValueError, match=f"task {failing} failed"):
            pool._exercise_failure(tasks=20, failing=failing)
        pool._exercise(regions=5, tasks=20)


@pytest.mark.parametrize("threads", [1, 4])
def test_nested_region_is_refused(lib: ModuleType, threads: int) -> None:
    pool = lib.Pool(threads)
    with pytest.raises(RuntimeError, match="cannot start another region"):
        pool._exercise_failure(tasks=4, failing=2, nested=True)
    with pytest.raises(RuntimeError, match="cannot start another region"):
        pool._exercise_failure(tasks=4, failing=2, rousing=True)
    pool._exercise(regions=5, tasks=20)


@pytest.mark.parametrize("threads", [0, -1, 1025])
def test_absurd_sizes_are_refused(lib: ModuleType, threads: int) -> None:
    with pytest.raises(ValueError, match="between 1 and 1024"):
        lib.Pool(threads)


def test_idle_pool_uses_no_processor() -> None:
    pool = native.lib().Pool(4)
    pool._exercise(regions=10, tasks=10)
    time.sleep(0.05)  # past the spinning
    start = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - start < 0.25  # one that spins: 0.5 and more


def test_bound_workers_still_do_everything() -> None:
    lib = native.lib()
    pool = lib.Pool(3, cpus=lib.default_threads()["cpus"])
    pool._exercise(regions=100, tasks=9)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_child_works_alone() -> None:
    pool = native.lib().Pool(4)
    pool._exercise(regions=10, tasks=10)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            pool._exercise(regions=10, tasks=10)
            try:
                pool._exercise_each(regions=1)
            except RuntimeError:
                code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_advice_on_this_machine(lib: ModuleType) -> None:
    advice = lib.default_threads()
    assert 1 <= advice["threads"] <= advice["cores"] <= advice["allowed"]
    assert len(advice["cpus"]) == advice["cores"]
    assert str(advice["cores"]) in advice["reason"]
    if hasattr(os, "sched_getaffinity"):
        assert advice["allowed"] == len(os.sched_getaffinity(0))
        assert set(advice["cpus"]) <= os.sched_getaffinity(0)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def make_cores(root: Path, siblings: str) -> None:
    for cpu in os.sched_getaffinity(0):
        folder = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        write(folder / "thread_siblings_list", siblings + "\n")


needs_affinity = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity"), reason="needs Linux affinity masks"
)


@needs_affinity
def test_siblings_count_once(tmp_path: Path) -> None:
    make_cores(tmp_path, "0-63")
    advice = native.lib().default_threads(str(tmp_path))
    assert (advice["cores"], advice["threads"], len(advice["cpus"])) == (1, 1, 1)
    assert advice["allowed"] == len(os.sched_getaffinity(0))


@needs_affinity
@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        (  # the tightest limit on the way up holds
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
                "sys/fs/cgroup/a/cpu.max": "120000 100000\n",
                "sys/fs/cgroup/cpu.max": "400000 100000\n",
            },
            1.2,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/box\n2:memory:/box\n",
                "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "50000\n",
                "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000\n",
            },
            0.5,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/box\n",
                "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
        (  # inside a container the group's own path is often not mounted: its root is
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/docker/0123\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "100000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            1.0,
        ),
        ({"proc/self/cgroup": "nonsense\n"}, None),
    ],
)
def test_control_group_quota(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    for name, text in files.items():
        write(tmp_path / name, text)
    advice = native.lib().default_threads(str(tmp_path))
    assert advice["quota"] == (None if quota is None else pytest.approx(quota))
    cores = advice["cores"]
    assert advice["threads"] == (cores if quota is None else max(1, min(cores, int(quota))))
    assert ("quota" in advice["reason"]) == (quota is not None)
