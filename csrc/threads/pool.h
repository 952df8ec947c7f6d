// A pool of worker threads for short parallel regions. The calling thread works too, as
// thread 0. Between regions a worker spins for a while, so that the regions of one decode
// step follow each other within about a microsecond, then sleeps, so that an idle process
// uses no processor. Knows nothing of what the bodies compute.
//
// A region is over when its tasks are done, not when every worker has taken part: a worker
// that is asleep, or whose processor is busy elsewhere, delays nobody.
//
// Workers do not exist in a forked child: there run() does all the work on the calling
// thread and each() throws.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "threads/function_ref.h"

namespace greenroom {

struct PoolOptions {
    int spin_us = 250;      // how long an idle worker spins before it sleeps
    std::vector<int> cpus;  // worker i is bound to cpus[i % size]; empty: the system places them
};

class Pool {
  public:
    // Throws std::invalid_argument unless 1 <= threads <= 1024.
    explicit Pool(int threads, PoolOptions options = {});
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    // Threads that take part in run(), the caller included.
    int size() const { return size_; }

    // Calls body(task, thread) for every task in [0, tasks), in no fixed order; thread is in
    // [0, size()). Rethrows the first exception a body throws; tasks that had not begun by
    // then are left out. Regions of several calling threads take turns; a body that starts a
    // region itself gets std::logic_error.
    void run(std::int64_t tasks, FunctionRef<void(std::int64_t task, int thread)> body);

    // Calls body(begin, end, thread) for ranges that cover [0, count). A range has at least
    // `grain` items (the last may have fewer), so small counts stay on the calling thread.
    void ranges(std::int64_t count, std::int64_t grain,
                FunctionRef<void(std::int64_t begin, std::int64_t end, int thread)> body);

    // Workers that sleep wake and spin again: a region is about to come, and waking takes longer
    // than the caller has then. A region under way is waited for, so not from within one
    // (std::logic_error).
    void rouse();

    // Calls body(thread) once on every thread, all at the same time, so that bodies may wait
    // for each other. Unlike run(), this waits for the slowest worker to wake.
    void each(FunctionRef<void(int thread)> body);

  private:
    enum class Kind : std::uint32_t { shared_tasks, every_thread, stop, count };

    void work(int thread);
    void wait_for_region(std::uint32_t seen);
    void stop();
    std::unique_lock<std::mutex> take_turn();
    void publish(Kind kind);
    std::int64_t take_tasks(int thread);
    void guarded(FunctionRef<void()> body);
    void finish();
    bool forked() const;

    const int size_;
    const int spin_us_;
    const bool crowded_;  // more threads than processors: spin politely
    const std::uint64_t forks_;
    std::vector<std::thread> workers_;
    std::mutex turn_;  // one region at a time

    // What the current region is. Written by the caller while no region is open.
    FunctionRef<void(std::int64_t, int)> task_body_;
    FunctionRef<void(int)> thread_body_;
    std::exception_ptr error_;

    // Each word that is written while others poll it has a cache line pair of its own
    // (adjacent lines are prefetched together).
    alignas(128) std::atomic<std::uint32_t> epoch_{0};   // region number * Kind::count + kind
    std::atomic<int> caller_cpu_{-1};                    // where the caller was at the time
    alignas(128) std::atomic<std::uint64_t> ticket_{0};  // tasks << 32 | next task
    alignas(128) std::atomic<std::int64_t> left_{0};     // tasks, or workers, not yet done
    alignas(128) std::atomic<int> sleepers_{0};
    std::atomic<bool> failed_{false};
};

}  // namespace greenroom
