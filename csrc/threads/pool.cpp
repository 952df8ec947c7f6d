#include "threads/pool.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>

#include "threads/park.h"
#include "threads/topology.h"

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace greenroom {
namespace {

using Clock = std::chrono::steady_clock;

thread_local bool inside_region = false;

// Marks this thread as working in a region for as long as it lives.
struct InsideRegion {
    InsideRegion() {
        if (inside_region) throw std::logic_error("Pool: a region cannot start another region");
        inside_region = true;
    }
    ~InsideRegion() { inside_region = false; }
};

std::atomic<std::uint64_t> fork_count{0};

std::uint64_t watch_forks() {
#if defined(__linux__)
    static const int installed = pthread_atfork(
        nullptr, nullptr, [] { fork_count.fetch_add(1, std::memory_order_relaxed); });
    (void)installed;
#endif
    return fork_count.load(std::memory_order_relaxed);
}

void bind(std::thread& thread, int cpu) {
#if defined(__linux__)
    cpu_set_t set;
    CPU_ZERO(&set);
    if (cpu >= 0 && cpu < CPU_SETSIZE) CPU_SET(cpu, &set);
    // A processor outside the allowed set is refused by the kernel; the worker then stays free.
    pthread_setaffinity_np(thread.native_handle(), sizeof set, &set);
#else
    (void)thread, (void)cpu;
#endif
}

int checked(int threads) {
    if (threads < 1 || threads > 1024)
        throw std::invalid_argument("Pool: threads must be between 1 and 1024");
    return threads;
}

}  // namespace

Pool::Pool(int threads, PoolOptions options)
    : size_(checked(threads)),
      spin_us_(std::clamp(options.spin_us, 0, 1'000'000)),
      crowded_(threads > allowed_cpus()),
      forks_(watch_forks()) {
    workers_.reserve(static_cast<std::size_t>(size_));
    try {
        for (int i = 1; i < size_; ++i) {
            workers_.emplace_back([this, i] { work(i); });
            if (options.cpus.empty()) continue;
            bind(workers_.back(), options.cpus[static_cast<std::size_t>(i) % options.cpus.size()]);
        }
    } catch (...) {  // the system has no more threads to give
        stop();
        throw;
    }
}

Pool::~Pool() {
    if (forked())  // nobody to join: the handles belong to threads of the parent process
        new std::vector<std::thread>(std::move(workers_));
    else
        stop();
}

void Pool::stop() {
    publish(Kind::stop);
    for (auto& worker : workers_) worker.join();
}

bool Pool::forked() const { return fork_count.load(std::memory_order_relaxed) != forks_; }

// One caller at a time, so that a thread number is used by one body at a time. In a forked
// child the lock may have been held by a thread that is gone.
std::unique_lock<std::mutex> Pool::take_turn() {
    return forked() ? std::unique_lock<std::mutex>() : std::unique_lock(turn_);
}

// Opens a region. The exchange of epoch_ and sleepers_ with wait_for_region() is sequentially
// consistent: either the worker sees the new epoch, or we see the sleeper and wake it.
void Pool::publish(Kind kind) {
    constexpr auto kinds = static_cast<std::uint32_t>(Kind::count);
    const std::uint32_t region = epoch_.load(std::memory_order_relaxed) / kinds + 1;
    caller_cpu_.store(current_cpu(), std::memory_order_relaxed);
    // Regions are numbered modulo 2^24, so that the product stays within the word.
    epoch_.store((region & 0xffffffu) * kinds + static_cast<std::uint32_t>(kind));
    if (sleepers_.load() != 0) unpark_all(epoch_);
}

// Returns once epoch_ differs from `seen`.
void Pool::wait_for_region(std::uint32_t seen) {
    const auto changed = [&] { return epoch_.load(std::memory_order_acquire) != seen; };
    const auto limit = Clock::now() + std::chrono::microseconds(spin_us_);
    for (int round = 0; round == 0 || Clock::now() < limit; ++round) {
        for (int i = 0; i < 64; ++i) {
            if (changed()) return;
            pause();
        }
        // Make way for our own threads. Yielding always would hand the processor to strangers,
        // for milliseconds, whenever the machine is busy.
        if (crowded_ || current_cpu() == caller_cpu_.load(std::memory_order_relaxed))
            std::this_thread::yield();
    }
    sleepers_.fetch_add(1);
    while (epoch_.load() == seen) park(epoch_, seen);
    sleepers_.fetch_sub(1);
}

void Pool::work(int thread) {
    constexpr auto kinds = static_cast<std::uint32_t>(Kind::count);
    inside_region = true;  // whatever runs here runs inside a region
    for (std::uint32_t seen = 0;;) {
        wait_for_region(seen);
        seen = epoch_.load(std::memory_order_acquire);
        switch (static_cast<Kind>(seen % kinds)) {
            case Kind::stop:
                return;
            case Kind::every_thread:
                guarded([&] { thread_body_(thread); });
                left_.fetch_sub(1, std::memory_order_release);
                break;
            default:
                // A late worker may find the tasks of a later region here: they are as good.
                if (const auto done = take_tasks(thread))
                    left_.fetch_sub(done, std::memory_order_release);
        }
    }
}

// Runs body, keeping the first exception of the region for the caller.
void Pool::guarded(FunctionRef<void()> body) {
    try {
        body();
    } catch (...) {
        if (!failed_.exchange(true)) error_ = std::current_exception();
    }
}

// Works on tasks until none is left; returns how many this thread took. Only after a task
// has been taken, and until left_ is lowered, are the fields of the region known to be its.
std::int64_t Pool::take_tasks(int thread) {
    constexpr std::uint64_t low = 0xffffffffu;
    std::int64_t taken = 0;
    for (std::uint64_t ticket = ticket_.load(std::memory_order_relaxed);
         (ticket & low) < (ticket >> 32); ticket = ticket_.load(std::memory_order_relaxed)) {
        ticket = ticket_.fetch_add(1, std::memory_order_acq_rel);
        const std::uint64_t task = ticket & low;
        if (task >= ticket >> 32) break;
        ++taken;
        if (failed_.load(std::memory_order_relaxed)) continue;
        guarded([&] { task_body_(static_cast<std::int64_t>(task), thread); });
    }
    return taken;
}

// Waits for the other threads' part of the region and rethrows what failed in it.
void Pool::finish() {
    for (int spins = 0; left_.load(std::memory_order_acquire) != 0; ++spins) {
        pause();
        if (spins % 64 == 63 && (crowded_ || spins > 4096)) std::this_thread::yield();
    }
    if (failed_.load(std::memory_order_relaxed)) {
        failed_.store(false, std::memory_order_relaxed);
        std::rethrow_exception(std::exchange(error_, nullptr));
    }
}

void Pool::run(std::int64_t tasks, FunctionRef<void(std::int64_t, int)> body) {
    if (tasks <= 0) return;
    if (tasks >= std::int64_t{1} << 31) throw std::invalid_argument("Pool: too many tasks");
    InsideRegion inside;
    const auto turn = take_turn();
    if (tasks == 1 || size_ == 1 || forked()) {
        for (std::int64_t task = 0; task < tasks; ++task) body(task, 0);
        return;
    }
    task_body_ = body;
    left_.store(tasks, std::memory_order_relaxed);
    ticket_.store(static_cast<std::uint64_t>(tasks) << 32, std::memory_order_release);
    publish(Kind::shared_tasks);
    left_.fetch_sub(take_tasks(0), std::memory_order_release);
    finish();
}

void Pool::ranges(std::int64_t count, std::int64_t grain,
                  FunctionRef<void(std::int64_t, std::int64_t, int)> body) {
    // Four ranges per thread even out threads of unequal speed.
    const std::int64_t share = (count + 4 * size_ - 1) / (4 * size_);
    const std::int64_t length = std::max({share, grain, std::int64_t{1}});
    run((count + length - 1) / length, [&](std::int64_t range, int thread) {
        body(range * length, std::min(count, (range + 1) * length), thread);
    });
}

// A region without tasks, as those of the one before are gone.
void Pool::rouse() {
    const InsideRegion inside;
    if (sleepers_.load(std::memory_order_relaxed) == 0 || forked()) return;
    const auto turn = take_turn();
    publish(Kind::shared_tasks);
}

void Pool::each(FunctionRef<void(int)> body) {
    InsideRegion inside;
    const auto turn = take_turn();
    if (size_ == 1) return body(0);
    if (forked()) throw std::runtime_error("Pool: its threads do not exist in a forked process");
    thread_body_ = body;
    left_.store(size_ - 1, std::memory_order_relaxed);
    publish(Kind::every_thread);
    guarded([&] { body(0); });
    finish();
}

}  // namespace greenroom
