// Hands out work items, numbered through several phases: one of a later phase only when all of the
// earlier ones are handed out. Threads go through lanes, equal parts of a phase, each through its
// own and then through what is left of the others'.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <vector>

namespace greenroom {

class Queue {
  public:
    struct Phase {
        std::int64_t items;
        int lanes;
    };

    Queue(std::initializer_list<Phase> phases) : phases_(phases) {
        std::int64_t count = 0, begin = 0;
        for (const Phase& phase : phases_) count += phase.lanes;
        lanes_ = std::make_unique<Lane[]>(count);
        Lane* lane = lanes_.get();
        for (const auto& [items, lanes] : phases_) {
            for (int i = 0; i < lanes; ++i, ++lane) {
                lane->next = begin + items * i / lanes;
                lane->end = begin + items * (i + 1) / lanes;
            }
            begin += items;
        }
        left_ = begin;
    }

    // The next item for a thread, or -1 when there is none left.
    std::int64_t take(int thread) {
        Lane* lane = lanes_.get();
        for (const Phase& phase : phases_) {
            for (int i = 0; i < phase.lanes; ++i) {
                const std::int64_t item = lane[(thread + i) % phase.lanes].take();
                if (item < 0) continue;
                left_.fetch_sub(1, std::memory_order_relaxed);
                return item;
            }
            lane += phase.lanes;
        }
        return -1;
    }

    // About how many are not yet handed out.
    std::int64_t left() const { return left_.load(std::memory_order_relaxed); }

  private:
    struct alignas(64) Lane {
        std::atomic<std::int64_t> next{0};
        std::int64_t end = 0;

        std::int64_t take() {
            if (next.load(std::memory_order_relaxed) >= end) return -1;
            const std::int64_t item = next.fetch_add(1, std::memory_order_relaxed);
            return item < end ? item : -1;
        }
    };

    std::vector<Phase> phases_;
    std::unique_ptr<Lane[]> lanes_;
    std::atomic<std::int64_t> left_{0};
};

}  // namespace greenroom
