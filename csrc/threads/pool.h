// A pool of worker threads for short parallel regions. run() hands out task indices from one
// shared counter and returns when every task is done; the calling thread works too.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace greenroom {

class Pool {
  public:
    explicit Pool(int threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    // Threads that take part in run(), the caller included.
    int size() const { return static_cast<int>(workers_.size()) + 1; }

    // Calls body(task, thread) for every task in [0, tasks); thread is in [0, size()).
    // body must not throw.
    void run(std::int64_t tasks, const std::function<void(std::int64_t, int)>& body);

    // Calls body(thread) once on every thread at the same time.
    void each(const std::function<void(int)>& body);

  private:
    void work(int thread);

    std::vector<std::thread> workers_;
    std::mutex mutex_;
    std::condition_variable wake_;
    const std::function<void(int)>* body_ = nullptr;
    std::atomic<std::uint64_t> epoch_{0};
    std::atomic<int> pending_{0};
    std::atomic<bool> stop_{false};
};

}  // namespace greenroom
