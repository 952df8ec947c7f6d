// One pass of the expert MLP over a bounded number of tokens: the plan, its memory and the work
// items. See step.cpp for how the items depend on each other.
#pragma once

#include <atomic>
#include <memory>

#include "moe/moe.h"
#include "moe/queue.h"

namespace greenroom {

class MoeStep {
  public:
    MoeStep(Pool& pool, const MoeLayer& layer, const Routes& routes, float* out);
    void run();

  private:
    // One expert with tokens routed to it.
    struct Job {
        const Expert* expert;
        std::int64_t first, count;  // its range in slots_
        Activations h;
        std::atomic<int> pending{0};  // gate/up chunks not yet done
        // Where h is bytes: its values (count, f) until a whole range of columns is there, and the
        // gate/up chunks still to come of each range.
        float* values = nullptr;
        std::unique_ptr<std::atomic<int>[]> missing;
    };
    // What one thread works with.
    struct Worker {
        float *gate, *up;
        std::uint8_t *scratch, *tokens;
        const Job* job = nullptr;  // the one whose tokens x is
        Activations x;
    };
    // Rows of a matrix cut into chunks of `rows`.
    struct Chunks {
        std::int64_t total, rows, count;
        Chunks(std::int64_t total, std::int64_t jobs, int threads, std::int64_t most);
        std::int64_t begin(std::int64_t chunk) const { return chunk * rows; }
        std::int64_t end(std::int64_t chunk) const { return std::min(total, begin(chunk + 1)); }
        std::int64_t size(std::int64_t chunk) const { return end(chunk) - begin(chunk); }
    };

    Forms forms_of(const Job& job) const {
        return forms_for(job.expert->gate, job.count) | forms_for(job.expert->up, job.count);
    }
    // Tokens to be quantised: one of zeros, too, if tiles may have to be filled up.
    std::int64_t rows() const { return routes_.tokens + (routes_.tokens > 1); }
    std::int64_t worker_bytes() const {
        return 2 * product_bytes_ + scratch_bytes_ + tokens_bytes_;
    }

    void group_by_expert();
    void reserve();
    void lay_out(Arena& arena);
    Worker worker(int thread) const;
    void work_off(Queue& queue, int thread);
    const std::uint8_t* start_of(std::int64_t index) const;
    void item(std::int64_t index, const std::uint8_t* next, Worker& worker);
    void fill(std::int64_t piece);
    const Activations& tokens_of(const Job& job, Worker& worker) const;
    void up_chunk(Job& job, std::int64_t chunk, const std::uint8_t* next, Worker& worker);
    void store_hidden(const Job& job, std::int64_t row, std::int64_t groups, const float* gate,
                      const float* up);
    void count_missing(Job& job) const;
    void quantise_hidden(const Job& job, std::int64_t chunk) const;
    void down_chunk(Job& job, std::int64_t chunk, const std::uint8_t* next, const Worker& worker);
    float* partial(std::int64_t chunk, std::int64_t slot) const {
        return partial_ + down_.begin(chunk) * routes_.tokens * routes_.k +
               slot * down_.size(chunk);
    }
    void store_partial(const Job& job, std::int64_t chunk, std::int64_t row, std::int64_t groups,
                       const float* product);
    void reduce(std::int64_t chunk);

    Pool& pool_;
    const MoeLayer& layer_;
    const Routes& routes_;
    float* out_;
    std::vector<std::int64_t> slots_;  // token * k + route, ordered by expert
    std::unique_ptr<Job[]> jobs_;
    int job_count_ = 0;
    std::int64_t named_;  // experts that have tokens
    Chunks up_, down_;
    Rows x_;
    std::int64_t pieces_;                            // how many items quantise x_
    std::atomic<int> unfilled_;                      // those of them that are not yet done
    std::unique_ptr<std::atomic<int>[]> unreduced_;  // jobs still to come, per down chunk
    float* partial_ = nullptr;                       // [down chunk][slot][row], weighted
    std::uint8_t* buffers_ = nullptr;                // of all workers
    std::int64_t product_bytes_ = 0, scratch_bytes_ = 0, tokens_bytes_ = 0;
};

}  // namespace greenroom
