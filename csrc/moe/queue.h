// Hands out work items, numbered through several phases: one of a later phase only when all of the
// earlier ones are handed out. Threads go through lanes, equal parts of a phase, each through its
// own and then through what is left of the others'.
#pragma once

#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <vector>

namespace greenroom {

class Queue {
    struct alignas(64) Lane {
        std::atomic<std::int64_t> next{0};
        std::int64_t end = 0;
    };
    struct Part {
        Lane* lane;
        int lanes;
        std::int64_t later;  // items of later phases
    };

  public:
    struct Phase {
        std::int64_t items;
        int lanes;
    };

    Queue(std::initializer_list<Phase> phases) {
        std::int64_t count = 0, later = 0, begin = 0;
        for (const Phase& phase : phases) count += phase.lanes, later += phase.items;
        lanes_ = std::make_unique<Lane[]>(count);
        Lane* lane = lanes_.get();
        for (const auto& [items, lanes] : phases) {
            parts_.push_back({lane, lanes, later -= items});
            for (int i = 0; i < lanes; ++i, ++lane) {
                lane->next = begin + items * i / lanes;
                lane->end = begin + items * (i + 1) / lanes;
            }
            begin += items;
        }
    }

    // One thread's way through a queue. A lane that was empty stays so: nobody comes back to it.
    class Way {
      public:
        Way(Queue& queue, int thread) : parts_(queue.parts_), thread_(thread) {}

        // The next item, or -1 when there is none left.
        std::int64_t take() {
            for (; phase_ < parts_.size(); ++phase_, tried_ = 0) {
                const Part& part = parts_[phase_];
                for (; tried_ < part.lanes; ++tried_) {
                    Lane& lane = part.lane[(thread_ + tried_) % part.lanes];
                    if (tried_ > 0 && lane.next.load(std::memory_order_relaxed) >= lane.end)
                        continue;
                    const std::int64_t item = lane.next.fetch_add(1, std::memory_order_relaxed);
                    if (item >= lane.end) continue;
                    left_ = (lane.end - 1 - item) * part.lanes + part.later;
                    return item;
                }
            }
            return -1;
        }

        // About how many are not yet handed out, if other lanes are as far.
        std::int64_t left() const { return left_; }

      private:
        const std::vector<Part>& parts_;
        const int thread_;
        std::size_t phase_ = 0;
        int tried_ = 0;  // lanes of the phase
        std::int64_t left_ = 0;
    };

  private:
    std::unique_ptr<Lane[]> lanes_;
    std::vector<Part> parts_;
};

}  // namespace greenroom
