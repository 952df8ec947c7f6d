// The thread pool and the advice on its size, as Python sees them.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <numeric>
#include <stdexcept>

#include "bindings.h"
#include "threads/pool.h"
#include "threads/topology.h"

namespace nb = nanobind;

namespace greenroom {
namespace {

nb::dict advice(const std::string& root) {
    const ThreadAdvice found = advise_threads(root);
    nb::dict result;
    result["threads"] = found.threads;
    result["allowed"] = found.allowed;
    result["cores"] = found.cores;
    result["quota"] = found.quota > 0 ? nb::object(nb::float_(found.quota)) : nb::none();
    result["cpus"] = found.cpus;
    result["reason"] = found.reason;
    return result;
}

// Runs `regions` regions of `tasks` tasks that count their own calls; returns nanoseconds per
// region. Raises if a task was left out or done twice.
double exercise(Pool& pool, int regions, std::int64_t tasks) {
    nb::gil_scoped_release release;
    std::vector<std::int64_t> calls(static_cast<std::size_t>(tasks), 0);
    const auto start = std::chrono::steady_clock::now();
    for (int region = 0; region < regions; ++region)
        pool.run(tasks, [&](std::int64_t task, int) { ++calls[static_cast<std::size_t>(task)]; });
    const std::chrono::duration<double, std::nano> taken = std::chrono::steady_clock::now() - start;
    for (std::int64_t count : calls)
        if (count != regions) throw std::runtime_error("Pool: a task was lost or done twice");
    return taken.count() / regions;
}

// The same for each(): every thread meets every other inside the region.
double exercise_each(Pool& pool, int regions) {
    nb::gil_scoped_release release;
    std::atomic<std::int64_t> met{0};
    const auto start = std::chrono::steady_clock::now();
    for (int region = 1; region <= regions; ++region)
        pool.each([&](int) {
            ++met;
            while (met.load() < std::int64_t{region} * pool.size()) std::this_thread::yield();
        });
    const std::chrono::duration<double, std::nano> taken = std::chrono::steady_clock::now() - start;
    if (met != std::int64_t{regions} * pool.size())
        throw std::runtime_error("Pool: a thread took part twice or not at all");
    return taken.count() / regions;
}

// A region whose task `failing` throws, one that starts a region and one that rouses its pool: all
// must raise.
void exercise_failure(Pool& pool, std::int64_t tasks, std::int64_t failing, bool nested,
                      bool rousing) {
    nb::gil_scoped_release release;
    pool.run(tasks, [&](std::int64_t task, int) {
        if (task != failing) return;
        if (nested) pool.run(2, [](std::int64_t, int) {});
        if (rousing) pool.rouse();
        throw std::invalid_argument("task " + std::to_string(task) + " failed");
    });
}

}  // namespace

void bind_threads(nb::module_& m) {
    m.def("default_threads", &advice, nb::arg("root") = "",
          "How many threads to use here and why: a dict with threads, allowed (logical processors "
          "in the affinity mask), cores (physical cores among them), quota (processors the control "
          "group grants, or None), cpus (one logical processor per core) and reason.");
    nb::class_<Pool>(m, "Pool")
        .def(
            "__init__",
            [](Pool* self, int threads, int spin_us, std::vector<int> cpus) {
                new (self) Pool(threads, PoolOptions{spin_us, std::move(cpus)});
            },
            nb::arg("threads"), nb::arg("spin_us") = 250, nb::arg("cpus") = std::vector<int>{},
            "Worker threads for parallel regions, the caller included. Idle workers spin for "
            "spin_us microseconds, then sleep. Worker i is bound to cpus[i % len(cpus)], if any.")
        .def_prop_ro("size", &Pool::size)
        .def("rouse", &Pool::rouse, nb::call_guard<nb::gil_scoped_release>(),
             "Workers that sleep wake and spin again: a region is about to come.")
        .def("_exercise", &exercise, nb::arg("regions"), nb::arg("tasks"))
        .def("_exercise_each", &exercise_each, nb::arg("regions"))
        .def("_exercise_failure", &exercise_failure, nb::arg("tasks"), nb::arg("failing"),
             nb::arg("nested") = false, nb::arg("rousing") = false);
}

}  // namespace greenroom
