#include "threads/pool.h"

namespace greenroom {

Pool::Pool(int threads) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
}

Pool::~Pool() {
    stop_ = true;
    {
        std::lock_guard lock(mutex_);
        ++epoch_;
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
}

void Pool::work(int thread) {
    std::uint64_t seen = 0;
    while (true) {
        {
            std::unique_lock lock(mutex_);
            wake_.wait(lock, [&] { return epoch_ != seen; });
            seen = epoch_;
        }
        if (stop_) return;
        (*body_)(thread);
        --pending_;
    }
}

void Pool::each(const std::function<void(int)>& body) {
    {
        std::lock_guard lock(mutex_);
        body_ = &body;
        pending_ = static_cast<int>(workers_.size());
        ++epoch_;
    }
    wake_.notify_all();
    body(0);
    while (pending_ != 0) std::this_thread::yield();
}

void Pool::run(std::int64_t tasks, const std::function<void(std::int64_t, int)>& body) {
    std::atomic<std::int64_t> next{0};
    each([&](int thread) {
        for (std::int64_t task; (task = next++) < tasks;) body(task, thread);
    });
}

}  // namespace greenroom
