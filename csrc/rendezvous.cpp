#include "rendezvous.h"

#include <chrono>
#include <stdexcept>

#include "threads/park.h"

namespace greenroom {
namespace {

using Clock = std::chrono::steady_clock;

std::int64_t ns_since(Clock::time_point start) {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - start).count();
}

void answer(const Mailbox& box, std::uint32_t value) {
    std::atomic_ref<std::uint32_t>(*box.done).store(value, std::memory_order_release);
}

}  // namespace

Rendezvous::Rendezvous(Pool& pool, std::vector<Mailbox> boxes, std::int64_t k, double patience)
    : pool_(pool),
      boxes_(std::move(boxes)),
      k_(k),
      patience_(patience),
      stats_(std::make_unique<RendezvousStats[]>(boxes_.size())),
      worker_([this] { work(); }) {}

Rendezvous::~Rendezvous() {
    cancel();
    {
        std::lock_guard lock(mutex_);
        stop_ = true;
    }
    changed_.notify_all();
    worker_.join();
}

void Rendezvous::begin(std::uint32_t number, std::int64_t tokens, std::size_t first,
                       std::size_t last) {
    std::lock_guard lock(mutex_);
    if (running_) throw std::logic_error("rendezvous: the step before is still under way");
    if (number == 0 || (number & flag) || number == number_)
        throw std::invalid_argument("rendezvous: " + std::to_string(number) +
                                    " cannot be the next step's number");
    number_ = number;
    tokens_ = tokens;
    first_ = first;
    last_ = last;
    cancelled_ = false;
    error_.clear();
    running_ = true;
    changed_.notify_all();
}

bool Rendezvous::wait(double seconds) {
    std::unique_lock lock(mutex_);
    const auto over = [this] { return !running_; };
    if (!changed_.wait_for(lock, std::chrono::duration<double>(seconds), over)) return false;
    if (!error_.empty()) throw std::runtime_error(std::exchange(error_, {}));
    return true;
}

void Rendezvous::cancel() { cancelled_ = true; }

void Rendezvous::work() {
    std::unique_lock lock(mutex_);
    for (;;) {
        changed_.wait(lock, [this] { return running_ || stop_; });
        if (!running_) return;
        lock.unlock();
        std::string error;
        try {
            step();
        } catch (const std::exception& e) {
            error = e.what();
            for (const Mailbox& box : boxes_) answer(box, number_ | flag);
        }
        lock.lock();
        error_ = error;
        running_ = false;
        changed_.notify_all();
    }
}

void Rendezvous::step() {
    pool_.rouse();  // while the device is about to ring
    for (std::size_t layer = first_; layer < last_; ++layer) {
        const auto start = Clock::now();
        const bool needed = rung(layer);
        stats_[layer].wait_ns += ns_since(start);
        if (needed) serve(layer);
        answer(boxes_[layer], number_);
    }
}

// Waits for the ring; whether there is something to compute.
bool Rendezvous::rung(std::size_t layer) {
    const std::atomic_ref<std::uint32_t> ring(*boxes_[layer].ring);
    const auto start = Clock::now();
    for (;;) {
        for (int i = 0; i < 256; ++i) {
            const std::uint32_t value = ring.load(std::memory_order_acquire);
            if ((value & ~flag) == number_) return !(value & flag);
            pause();
        }
        const std::string where = "rendezvous: step " + std::to_string(number_) + ", MoE layer " +
                                  std::to_string(layer) + ": ";
        if (cancelled_) throw std::runtime_error(where + "cancelled");
        if (static_cast<double>(ns_since(start)) > patience_ * 1e9)
            throw std::runtime_error(where + "the device did not ring in time");
    }
}

void Rendezvous::check_ids(std::size_t layer) {
    const Mailbox& box = boxes_[layer];
    const auto& experts = box.layer->experts;
    ids_.assign(box.ids, box.ids + tokens_ * k_);
    const auto known = static_cast<std::int64_t>(experts.size());
    for (std::int64_t i = 0; i < tokens_ * k_; ++i) {
        const std::int32_t id = ids_[static_cast<std::size_t>(i)];
        if (id == -1) continue;
        bool good = id >= 0 && id < known && experts[static_cast<std::size_t>(id)].present();
        // The native step shares one token's activations: an expert may have it once only.
        for (std::int64_t j = i - i % k_; good && j < i; ++j)
            good = ids_[static_cast<std::size_t>(j)] != id;
        if (good) continue;
        throw std::runtime_error("rendezvous: MoE layer " + std::to_string(layer) +
                                 " was sent expert id " + std::to_string(id) +
                                 ", which is not in memory or came twice for one token");
    }
}

void Rendezvous::serve(std::size_t layer) {
    const Mailbox& box = boxes_[layer];
    const auto start = Clock::now();
    check_ids(layer);
    run_moe(pool_, *box.layer, {box.hidden, ids_.data(), box.weights, tokens_, k_}, box.result);
    stats_[layer].compute_ns += ns_since(start);
    stats_[layer].calls += 1;
}

}  // namespace greenroom
