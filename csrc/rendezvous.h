// Serves the MoE layers of one decode step, or one layer of a long step, to a device that writes
// hidden states and routes to shared memory and rings: one thread answers layer after layer, so
// nobody else has to wait in between. Knows nothing of the device; whatever lies in the shared
// memory may be wrong.
//
// A bell is a word with a cache line to itself. The device writes the step's number to `ring`,
// with `flag` if no route is for this processor. The number in `done` says that the result is
// there, with `flag` that the step has failed and there is none.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "moe/moe.h"

namespace greenroom {

struct Mailbox {
    const MoeLayer* layer;
    const float* hidden;  // (tokens, d)
    const std::int32_t* ids;
    const float* weights;  // (tokens, k), as ids
    float* result;         // (tokens, d)
    std::uint32_t* ring;
    std::uint32_t* done;
};

// Of one layer, over all steps. Written by the worker.
struct RendezvousStats {
    std::atomic<std::int64_t> wait_ns{0}, compute_ns{0}, calls{0};
};

class Rendezvous {
  public:
    static constexpr std::uint32_t flag = 0x80000000u;

    // k routes a token. A ring that does not come within `patience` seconds fails the step.
    Rendezvous(Pool& pool, std::vector<Mailbox> boxes, std::int64_t k, double patience);
    ~Rendezvous();
    Rendezvous(const Rendezvous&) = delete;
    Rendezvous& operator=(const Rendezvous&) = delete;

    // Starts step `number` (in [1, 2^31), unlike the step before) of the layers [first, last).
    // Throws std::logic_error while a step is under way.
    void begin(std::uint32_t number, std::int64_t tokens, std::size_t first, std::size_t last);
    // Whether the step ended within `seconds`. Throws std::runtime_error, once, if it failed.
    bool wait(double seconds);
    // Fails the step under way, if any, when it next waits for a ring.
    void cancel();
    const RendezvousStats& stats(std::size_t layer) const { return stats_[layer]; }

  private:
    void work();
    void step();
    void serve(std::size_t layer);
    bool rung(std::size_t layer);
    void check_ids(std::size_t layer);

    Pool& pool_;
    const std::vector<Mailbox> boxes_;
    const std::int64_t k_;
    const double patience_;
    std::unique_ptr<RendezvousStats[]> stats_;
    std::mutex mutex_;
    std::condition_variable changed_;
    bool running_ = false, stop_ = false;  // under mutex_, as error_
    std::string error_;
    std::atomic<bool> cancelled_{false};
    std::uint32_t number_ = 0;  // fixed while running_, as the next two
    std::int64_t tokens_ = 0;
    std::size_t first_ = 0, last_ = 0;
    std::vector<std::int32_t> ids_;  // checked copy: the device could change its own
    std::thread worker_;             // last: it uses everything above
};

}  // namespace greenroom
