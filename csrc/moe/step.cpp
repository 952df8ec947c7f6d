// Items are handed out in phases (queue.h): pieces of the tokens to be quantised, then every
// (expert, chunk of gate and up rows), then every (expert, chunk of down rows). A down chunk needs
// all of its expert's hidden values; it waits for them, which cannot block for ever because all
// gate/up items were handed out before and wait for the pieces alone. Usually they are long done:
// other experts lie in between. The last job to finish a chunk of output rows adds up that chunk.
// While the last tokens are quantised, other threads ask for their first weights. A thread copies a
// job's tokens together when it first meets the job.
#include "moe/step.h"

#include <algorithm>
#include <cstring>
#include <thread>

namespace greenroom {
namespace {

// Rows computed together: their activations are read once, their products stay in L1.
constexpr std::int64_t rows_at_once = 64, groups_at_once = rows_at_once / 16;
// A chunk is a multiple of 32 rows, so that whoever has it quantises whole blocks (but bytes for
// AMX, 512 columns of which have one scale). There are chunks of output rows for all threads, as
// each is added up by one.
constexpr std::int64_t chunk_unit = 32, largest_chunk = 512;
// Chunks of a thread, about: few are left when the first threads have none.
constexpr std::int64_t chunks_per_thread = 24;

// An expert's tokens are cut into equal jobs of at most so many, whose activations stay in L2.
constexpr std::int64_t tokens_at_once = 128;

std::int64_t jobs_of(std::int64_t tokens) { return (tokens + tokens_at_once - 1) / tokens_at_once; }

// From so many tokens a job on, on average, threads keep to lanes of neighbouring items: a thread
// copies the tokens of every job it meets. Shorter jobs are handed out to whoever is next.
constexpr std::size_t lane_tokens = 8;

enum Slot { activations_slot, product_slot };

// 16 biases from `row` on, zeros beyond the end.
simd::Floats bias_at(const float* bias, std::int64_t row, std::int64_t rows) {
    if (!bias) return simd::zero();
    if (row + 16 <= rows) return simd::load(bias + row);
    float padded[16] = {};
    for (std::int64_t i = row; i < rows; ++i) padded[i - row] = bias[i];
    return simd::load(padded);
}

// How many experts the routes name.
std::int64_t named(const Routes& routes, std::size_t experts) {
    std::vector<bool> seen(experts);
    for (std::int64_t i = 0; i < routes.tokens * routes.k; ++i)
        if (routes.ids[i] >= 0) seen[static_cast<std::size_t>(routes.ids[i])] = true;
    return std::count(seen.begin(), seen.end(), true);
}

// The first weights of a thread, which nobody has asked for before.
void ask_for(const std::uint8_t* weights) {
    for (int i = 0; weights && i < 8192; i += 64) simd::prefetch_far(weights + i);
}

void wait_for_zero(const std::atomic<int>& pending) {
    for (int spins = 0; pending.load(std::memory_order_acquire) != 0; ++spins) {
        simd::pause();
        if (spins % 64 == 63 && spins > 1024) std::this_thread::yield();
    }
}

}  // namespace

MoeStep::Chunks::Chunks(std::int64_t total_rows, std::int64_t jobs, int threads, std::int64_t most)
    : total(total_rows) {
    const std::int64_t units = (total + chunk_unit - 1) / chunk_unit;
    const std::int64_t share = units * jobs / (threads * chunks_per_thread);
    rows = std::clamp<std::int64_t>(share, 1, (most + chunk_unit - 1) / chunk_unit) * chunk_unit;
    if (rows > rows_at_once) rows = (rows + rows_at_once - 1) / rows_at_once * rows_at_once;
    count = (total + rows - 1) / rows;
}

MoeStep::MoeStep(Pool& pool, const MoeLayer& layer, const Routes& routes, float* out)
    : pool_(pool),
      layer_(layer),
      routes_(routes),
      out_(out),
      named_(named(routes, layer.experts.size())),
      up_(layer.f, named_, pool.size(), largest_chunk),
      down_(layer.d, named_, pool.size(), std::min(largest_chunk, (layer.d - 1) / pool.size() + 1)),
      pieces_(std::min<std::int64_t>(rows(), 4 * pool.size())),
      unfilled_(static_cast<int>(pieces_)) {
    group_by_expert();
    unreduced_ = std::make_unique<std::atomic<int>[]>(down_.count);
    for (std::int64_t c = 0; c < down_.count; ++c) unreduced_[c] = job_count_;
    reserve();
}

// Counting sort of the routes by expert, cut into jobs.
void MoeStep::group_by_expert() {
    const std::int64_t routes = routes_.tokens * routes_.k;
    std::vector<std::int64_t> begin(layer_.experts.size() + 1, 0);
    for (std::int64_t i = 0; i < routes; ++i)
        if (routes_.ids[i] >= 0) ++begin[routes_.ids[i] + 1];
    for (std::size_t e = 0; e < layer_.experts.size(); ++e) {
        job_count_ += static_cast<int>(jobs_of(begin[e + 1]));
        begin[e + 1] += begin[e];
    }
    slots_.resize(begin.back());
    jobs_ = std::make_unique<Job[]>(job_count_);
    int job = 0;
    for (std::size_t e = 0; e < layer_.experts.size(); ++e) {
        const std::int64_t tokens = begin[e + 1] - begin[e], parts = jobs_of(tokens);
        for (std::int64_t i = 0; i < parts; ++i) {
            const std::int64_t first = tokens * i / parts;
            jobs_[job].expert = &layer_.experts[e];
            jobs_[job].first = begin[e] + first;
            jobs_[job].count = tokens * (i + 1) / parts - first;
            jobs_[job++].pending = static_cast<int>(up_.count);
        }
    }
    for (std::int64_t i = 0; i < routes; ++i)
        if (routes_.ids[i] >= 0) slots_[begin[routes_.ids[i]]++] = i;
}

void MoeStep::reserve() {
    for (int j = 0; j < job_count_; ++j) {
        const Job& job = jobs_[j];
        const Expert& e = *job.expert;
        product_bytes_ = std::max(product_bytes_, product_floats(job.count, groups_at_once) * 4);
        for (const Matrix* m : {&e.gate, &e.up, &e.down})
            scratch_bytes_ =
                std::max(scratch_bytes_, multiply_scratch(*m, job.count, groups_at_once));
        Arena count(nullptr);
        if (job.count > 1) Activations::take(count, forms_of(job), job.count, layer_.d);
        tokens_bytes_ = std::max(tokens_bytes_, count.used());
    }
    buffers_ = scratch(product_slot, worker_bytes() * pool_.size());
    Arena count(nullptr);
    lay_out(count);
    Arena arena(scratch(activations_slot, count.used()));
    lay_out(arena);
    for (int j = 0; j < job_count_; ++j)
        if (jobs_[j].values) count_missing(jobs_[j]);
}

// How many chunks have a part of each range.
void MoeStep::count_missing(Job& job) const {
    const std::int64_t ranges = ranges_of(job.h.blocks);
    job.missing = std::make_unique<std::atomic<int>[]>(ranges);
    for (std::int64_t r = 0; r < ranges; ++r) {
        const std::int64_t last = std::min(layer_.f, (r + 1) * range_cols) - 1;
        job.missing[r] = static_cast<int>(last / up_.rows - r * range_cols / up_.rows + 1);
    }
}

void MoeStep::lay_out(Arena& arena) {
    partial_ = arena.take<float>(routes_.tokens * routes_.k * layer_.d);
    Forms forms;
    for (int j = 0; j < job_count_; ++j) {
        Job& job = jobs_[j];
        const Forms hidden = forms_for(job.expert->down, job.count);
        forms = forms | forms_of(job);
        job.h = Activations::take(arena, hidden, job.count, layer_.f);
        if (hidden.bytes) job.values = arena.take<float>(job.count * layer_.f);
    }
    x_ = Rows::take(arena, forms, routes_.tokens, layer_.d);
}

void MoeStep::run() {
    if (job_count_ == 0) {
        std::memset(out_, 0, routes_.tokens * layer_.d * sizeof(float));
        return;
    }
    const int lanes = slots_.size() < lane_tokens * job_count_ ? 1 : pool_.size();
    Queue queue{{pieces_, 1}, {job_count_ * up_.count, lanes}, {job_count_ * down_.count, lanes}};
    pool_.run(pool_.size(), [&](std::int64_t, int thread) { work_off(queue, thread); });
}

MoeStep::Worker MoeStep::worker(int thread) const {
    std::uint8_t* buffer = buffers_ + thread * worker_bytes();
    Worker w;
    w.gate = reinterpret_cast<float*>(buffer);
    w.up = reinterpret_cast<float*>(buffer + product_bytes_);
    w.scratch = buffer + 2 * product_bytes_;
    w.tokens = w.scratch + scratch_bytes_;
    return w;
}

// Takes each item while the one before is still to be done, so that its weights can be asked for
// in time; towards the end only what can be begun at once. An item that waits, waits for items of
// earlier phases, and those are in the hands of threads that do not wait for this one.
void MoeStep::work_off(Queue& queue, int thread) {
    const std::int64_t late = 2 * pool_.size();
    Queue::Way way(queue, thread);
    Worker own = worker(thread);
    std::int64_t index = way.take();
    if (index >= 0) ask_for(start_of(index));
    while (index >= 0) {
        const std::int64_t next = way.left() >= late ? way.take() : -1;
        item(index, next < 0 ? nullptr : start_of(next), own);
        index = next < 0 ? way.take() : next;
    }
}

// The weights an item begins with, or null.
const std::uint8_t* MoeStep::start_of(std::int64_t index) const {
    if (index < pieces_) return nullptr;
    index -= pieces_;
    const std::int64_t ups = job_count_ * up_.count;
    if (index < ups)
        return jobs_[index / up_.count].expert->gate.group(index % up_.count * up_.rows / 16);
    index -= ups;
    return jobs_[index / down_.count].expert->down.group(index % down_.count * down_.rows / 16);
}

void MoeStep::item(std::int64_t index, const std::uint8_t* next, Worker& worker) {
    if (index < pieces_) {
        fill(index);
        return ask_for(next);
    }
    index -= pieces_;
    const std::int64_t ups = job_count_ * up_.count;
    if (index < ups) return up_chunk(jobs_[index / up_.count], index % up_.count, next, worker);
    index -= ups;
    down_chunk(jobs_[index / down_.count], index % down_.count, next, worker);
}

void MoeStep::fill(std::int64_t piece) {
    const std::int64_t end = rows() * (piece + 1) / pieces_;
    for (std::int64_t t = rows() * piece / pieces_; t < end; ++t)
        x_.put(t, t < routes_.tokens ? routes_.hidden + t * layer_.d : nullptr);
    unfilled_.fetch_sub(1, std::memory_order_release);
}

// One token is used where it lies.
const Activations& MoeStep::tokens_of(const Job& job, Worker& worker) const {
    if (worker.job == &job) return worker.x;
    worker.job = &job;
    std::int64_t numbers[tokens_at_once];
    for (std::int64_t t = 0; t < job.count; ++t) numbers[t] = slots_[job.first + t] / routes_.k;
    if (job.count == 1) return worker.x = x_.tile_of_one(numbers[0]);
    Arena arena(worker.tokens);
    worker.x = Activations::take(arena, forms_of(job), job.count, layer_.d);
    worker.x.gather(x_, numbers);
    return worker.x;
}

void MoeStep::up_chunk(Job& job, std::int64_t chunk, const std::uint8_t* next, Worker& worker) {
    wait_for_zero(unfilled_);
    const Activations& x = tokens_of(job, worker);
    const std::int64_t end = up_.end(chunk);
    for (std::int64_t row = chunk * up_.rows; row < end; row += rows_at_once) {
        const std::int64_t groups = groups_of(std::min(rows_at_once, end - row));
        const Matrix &g = job.expert->gate, &u = job.expert->up;
        const std::int64_t first = row / 16, after = row + rows_at_once;
        multiply(g, first, groups, x, u.group(first), worker.gate, worker.scratch);
        multiply(u, first, groups, x, after < end ? g.group(after / 16) : next, worker.up,
                 worker.scratch);
        store_hidden(job, row, groups, worker.gate, worker.up);
    }
    if (job.values) quantise_hidden(job, chunk);
    job.pending.fetch_sub(1, std::memory_order_acq_rel);
}

// Whoever finishes a range of columns quantises it.
void MoeStep::quantise_hidden(const Job& job, std::int64_t chunk) const {
    for (std::int64_t r = up_.begin(chunk) / range_cols; r * range_cols < up_.end(chunk); ++r)
        if (job.missing[r].fetch_sub(1, std::memory_order_acq_rel) == 1)
            for (std::int64_t t = 0; t < job.count; ++t)
                job.h.put_range(t, r, job.values + t * layer_.f);
}

void MoeStep::store_hidden(const Job& job, std::int64_t row, std::int64_t groups, const float* gate,
                           const float* up) {
    using namespace simd;
    const Expert& e = *job.expert;
    const Floats gate_scale = splat(e.gate.scale), up_scale = splat(e.up.scale);
    const std::int64_t padded = padded_tokens(job.count);
    for (std::int64_t t = 0; t < padded; ++t) {
        float h[rows_at_once] = {};
        const std::int64_t at = t * groups * 16;
        for (std::int64_t g = 0; g < groups && t < job.count; ++g) {
            const std::int64_t r = row + 16 * g;
            const Floats a = load(gate + at + 16 * g) * gate_scale;
            const Floats b = load(up + at + 16 * g) * up_scale;
            store(h + 16 * g, activate(layer_.activation, a + bias_at(e.gate_bias, r, layer_.f),
                                       b + bias_at(e.up_bias, r, layer_.f)));
        }
        if (job.values && t < job.count)
            std::memcpy(job.values + t * layer_.f + row, h,
                        std::min(groups * 16, layer_.f - row) * sizeof(float));
        const Place place = place_of(t, job.count);
        for (std::int64_t block = 0; 2 * block < groups; ++block)
            job.h.put(place, row / 32 + block, h + 32 * block);
    }
}

void MoeStep::down_chunk(Job& job, std::int64_t chunk, const std::uint8_t* next,
                         const Worker& worker) {
    wait_for_zero(job.pending);
    const std::int64_t end = down_.end(chunk);
    for (std::int64_t row = chunk * down_.rows; row < end; row += rows_at_once) {
        const std::int64_t groups = groups_of(std::min(rows_at_once, end - row));
        const std::int64_t after = row + rows_at_once;
        const Matrix& down = job.expert->down;
        multiply(down, row / 16, groups, job.h, after < end ? down.group(after / 16) : next,
                 worker.gate, worker.scratch);
        store_partial(job, chunk, row, groups, worker.gate);
    }
    if (unreduced_[chunk].fetch_sub(1, std::memory_order_acq_rel) == 1) reduce(chunk);
}

// Asks for the memory of later tokens: it lies here and there, and stores wait long for it.
void MoeStep::store_partial(const Job& job, std::int64_t chunk, std::int64_t row,
                            std::int64_t groups, const float* product) {
    constexpr std::int64_t ahead = 4;
    const Expert& e = *job.expert;
    const std::int64_t count = std::min(16 * groups, layer_.d - row), at = row - down_.begin(chunk);
    for (std::int64_t t = 0; t < job.count; ++t) {
        if (t + ahead < job.count) {
            const float* later = partial(chunk, slots_[job.first + t + ahead]) + at;
            for (std::int64_t i = 0; i < count; i += 16) simd::prefetch(later + i);
        }
        const std::int64_t slot = slots_[job.first + t];
        const float weight = routes_.weights[slot];
        const float* from = product + t * groups * 16;
        float* to = partial(chunk, slot) + at;
        for (std::int64_t i = 0; i < count; ++i)
            to[i] = weight * (from[i] * e.down.scale + (e.down_bias ? e.down_bias[row + i] : 0.0f));
    }
}

// Adds a token's routes in their order.
void MoeStep::reduce(std::int64_t chunk) {
    const std::int64_t count = down_.size(chunk);
    for (std::int64_t token = 0; token < routes_.tokens; ++token) {
        float* to = out_ + token * layer_.d + down_.begin(chunk);
        std::memset(to, 0, count * sizeof(float));
        for (std::int64_t slot = token * routes_.k; slot < (token + 1) * routes_.k; ++slot) {
            if (routes_.ids[slot] < 0) continue;
            const float* from = partial(chunk, slot);
            for (std::int64_t i = 0; i < count; ++i) to[i] += from[i];
        }
    }
}

// Tokens are taken in equal passes that keep the partial results at 64 MiB.
void run_moe(Pool& pool, const MoeLayer& layer, const Routes& routes, float* out) {
    constexpr std::int64_t limit = std::int64_t{16} << 20;  // floats
    const std::int64_t most = std::max<std::int64_t>(16, limit / (routes.k * layer.d));
    const std::int64_t passes = (routes.tokens + most - 1) / most;
    for (std::int64_t i = 0; i < passes; ++i) {
        const std::int64_t t = routes.tokens * i / passes;
        Routes part = routes;
        part.hidden += t * layer.d;
        part.ids += t * routes.k;
        part.weights += t * routes.k;
        part.tokens = routes.tokens * (i + 1) / passes - t;
        MoeStep(pool, layer, part, out + t * layer.d).run();
    }
}

}  // namespace greenroom
