"""Prints what an empty parallel region of the native thread pool costs.

`run`: the caller may do all tasks itself before a worker arrives. `each`: every thread takes
part, so this is the time to reach all of them and back. `asleep`: the first `each` after the
workers went to sleep. Usage: PYTHONPATH=src python bench/pool_latency.py [threads ...]
"""

import statistics
import sys
import time

from greenroom import native

REPEATS = 7


def measure(threads: int) -> tuple[float, float, float]:
    """Microseconds per region: run, each, each after sleep."""
    pool = native.lib().Pool(threads)
    run = statistics.median(pool._exercise(2000, threads) for _ in range(REPEATS))
    each = statistics.median(pool._exercise_each(200) for _ in range(REPEATS))
    asleep = []
    for _ in range(REPEATS):
        time.sleep(0.003)
        asleep.append(pool._exercise_each(1))
    return run / 1e3, each / 1e3, statistics.median(asleep) / 1e3


def main() -> None:
    advice = native.lib().default_threads()
    print(advice["reason"])
    print("threads  run us  each us  asleep us")
    for threads in [int(a) for a in sys.argv[1:]] or [1, advice["threads"], 2 * advice["threads"]]:
        run, each, asleep = measure(threads)
        print(f"{threads:7}  {run:6.2f}  {each:7.2f}  {asleep:9.2f}")


if __name__ == "__main__":
    main()
