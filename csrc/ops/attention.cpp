#include "ops/attention.h"

#include <stdexcept>
#include <string>
#include <vector>

#include "ops/attention_tile.h"

namespace greenroom {
namespace {

constexpr std::int64_t kSpan = 512;      // keys that share a softmax; a multiple of kTileKeys
constexpr std::int64_t kTileRows = 32;   // rows that share a pass over the keys, if heads allow
constexpr std::int64_t kDirectRows = 8;  // up to here, converting keys on the fly is cheaper

// A unit of work: some consecutive queries of a sequence, all their heads of one kv head.
struct Item {
    std::int64_t sequence, kv_head, first_query, queries;
    std::int64_t first_key, last_key;  // what any of the queries sees: [first_key, last_key)
    std::int64_t first_span() const { return first_key / kSpan; }
    std::int64_t spans() const { return (last_key - 1) / kSpan - first_span() + 1; }
};

// Everything that stays the same during one call.
struct Call {
    const Rows<const float>& q;
    const CacheView& keys;
    const CacheView& values;
    const AttentionBatch& batch;
    const AttentionRule& rule;
    float* out;
    std::int64_t group;                   // query heads per kv head
    std::int64_t key_width, value_width;  // padded to whole vectors

    std::int64_t rows(const Item& item) const { return item.queries * group; }
    std::int64_t position(const Item& item, std::int64_t query) const {
        const auto s = item.sequence;
        const std::int64_t queries = batch.query_starts[s + 1] - batch.query_starts[s];
        return batch.contexts[s] - queries + query;
    }
    std::int64_t first_visible(std::int64_t position) const {
        return rule.window > 0 ? std::max<std::int64_t>(0, position - rule.window + 1) : 0;
    }
};

// What one thread works in.
struct Workspace {
    float *q, *scores, *corrections, *keys, *values;
    Softmax span, whole;

    Workspace(const Call& call, std::int64_t rows) {
        thread_local Scratch scratch;
        const std::int64_t kw = call.key_width, vw = call.value_width;
        const std::int64_t softmax = padded(Softmax::floats(rows, vw));
        float* at = scratch.take(rows * (kw + kTileKeys) + padded(rows) + 2 * softmax +
                                 kTileKeys * (kw + vw));
        const auto cut = [&](std::int64_t floats) { return std::exchange(at, at + floats); };
        q = cut(rows * kw);
        scores = cut(rows * kTileKeys);
        keys = cut(kTileKeys * kw);
        values = cut(kTileKeys * vw);
        span = Softmax::in(cut(softmax), rows, vw);
        whole = Softmax::in(cut(softmax), rows, vw);
        corrections = cut(padded(rows));
    }
};

void copy_padded(const float* from, std::int64_t width, float* to, std::int64_t padded_width) {
    std::copy_n(from, width, to);
    std::fill(to + width, to + padded_width, 0.0f);
}

void copy_padded(const Half* from, std::int64_t width, float* to, std::int64_t padded_width) {
    std::int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) store(to + i, load(from + i));
    for (; i < width; ++i) to[i] = to_float(from[i]);
    std::fill(to + width, to + padded_width, 0.0f);
}

// Where the keys (or values) at positions [begin, end) of a tile lie. Entries outside point to
// one inside, so that all of them can be read.
template <class T>
void locate(const Call& call, const Item& item, const CacheView& cache, std::int64_t tile,
            std::int64_t begin, std::int64_t end, const T** rows) {
    const std::int32_t* table = call.batch.block_tables + item.sequence * call.batch.table_width;
    const std::int64_t size = cache.block_size;
    for (std::int64_t key = begin; key < end; ++key) {
        const std::int64_t block = table[(tile + key) / size], offset = (tile + key) % size;
        rows[key] = static_cast<const T*>(cache.data) +
                    ((block * cache.heads + item.kv_head) * size + offset) * cache.width;
    }
    for (std::int64_t key = 0; key < begin; ++key) rows[key] = rows[begin];
    for (std::int64_t key = end; key < kTileKeys; ++key) rows[key] = rows[begin];
}

// The same rows as floats of padded width, in `buffer`.
template <class T>
void convert(const T* const* rows, std::int64_t width, std::int64_t padded_width,
             std::int64_t begin, std::int64_t end, float* buffer, const float** converted) {
    for (std::int64_t key = begin; key < end; ++key)
        copy_padded(rows[key], width, buffer + key * padded_width, padded_width);
    for (std::int64_t key = 0; key < kTileKeys; ++key)
        converted[key] = buffer + (key < begin || key >= end ? begin : key) * padded_width;
}

void weigh_rows(const Call& call, const Item& item, std::int64_t tile, const Workspace& work) {
    for (std::int64_t row = 0; row < call.rows(item); ++row) {
        const std::int64_t position = call.position(item, item.first_query + row / call.group);
        work.corrections[row] =
            weigh(work.scores + row * kTileKeys, call.first_visible(position) - tile,
                  position + 1 - tile, call.rule.scale, work.span.most[row], work.span.total[row]);
    }
}

// One tile of keys [tile + begin, tile + end) for all rows of the item.
template <class T>
void visit_tile(const Call& call, const Item& item, std::int64_t tile, std::int64_t begin,
                std::int64_t end, const Workspace& work) {
    const std::int64_t rows = call.rows(item), kw = call.key_width, vw = call.value_width;
    const T* rows_in_cache[kTileKeys];
    const float* converted[kTileKeys];
    const bool many = std::is_same_v<T, Half> && (rows > kDirectRows || kLanes == 4);

    locate(call, item, call.keys, tile, begin, end, rows_in_cache);
    if (many || call.keys.width != kw) {
        convert(rows_in_cache, call.keys.width, kw, begin, end, work.keys, converted);
        dot_rows(work.q, rows, kw, converted, begin, end, kw, work.scores, kTileKeys);
    } else {
        dot_rows(work.q, rows, kw, rows_in_cache, begin, end, kw, work.scores, kTileKeys);
    }
    weigh_rows(call, item, tile, work);
    locate(call, item, call.values, tile, begin, end, rows_in_cache);
    if (many || call.values.width != vw) {
        convert(rows_in_cache, call.values.width, vw, begin, end, work.values, converted);
        blend_rows(work.scores, work.corrections, rows, converted, begin, end, work.span.values,
                   vw);
    } else {
        blend_rows(work.scores, work.corrections, rows, rows_in_cache, begin, end, work.span.values,
                   vw);
    }
}

// The softmax of the item's rows over the keys of one span, into work.span.
void visit_span(const Call& call, const Item& item, std::int64_t span, const Workspace& work) {
    const std::int64_t rows = call.rows(item);
    work.span.clear(rows, call.value_width);
    const std::int64_t first = std::max(item.first_key, span * kSpan);
    const std::int64_t last = std::min(item.last_key, (span + 1) * kSpan);
    for (std::int64_t tile = first / kTileKeys * kTileKeys; tile < last; tile += kTileKeys) {
        const std::int64_t begin = std::max<std::int64_t>(0, first - tile);
        const std::int64_t end = std::min(kTileKeys, last - tile);
        if (call.keys.half)
            visit_tile<Half>(call, item, tile, begin, end, work);
        else
            visit_tile<float>(call, item, tile, begin, end, work);
    }
}

void gather_queries(const Call& call, const Item& item, const Workspace& work) {
    const std::int64_t start = call.batch.query_starts[item.sequence] + item.first_query;
    for (std::int64_t row = 0; row < call.rows(item); ++row)
        copy_padded(
            call.q.at(start + row / call.group, item.kv_head * call.group + row % call.group),
            call.q.width, work.q + row * call.key_width, call.key_width);
}

// Divides by the softmax's sum, which the sinks join, and writes the rows out.
void finish(const Call& call, const Item& item, const Softmax& whole) {
    const std::int64_t start = call.batch.query_starts[item.sequence] + item.first_query;
    const std::int64_t width = call.values.width;
    for (std::int64_t row = 0; row < call.rows(item); ++row) {
        const std::int64_t head = item.kv_head * call.group + row % call.group;
        float factor = 1.0f / whole.total[row];
        if (call.rule.sinks) {
            const float sink = call.rule.sinks[head], most = std::max(whole.most[row], sink);
            const float mine = exp_one(whole.most[row] - most);
            factor = mine / (whole.total[row] * mine + exp_one(sink - most));
        }
        float* to = call.out + ((start + row / call.group) * call.q.heads + head) * width;
        const float* from = whole.values + row * call.value_width;
        for (std::int64_t i = 0; i < width; ++i) to[i] = from[i] * factor;
    }
}

void whole_item(const Call& call, const Item& item) {
    const std::int64_t rows = call.rows(item);
    const Workspace work(call, rows);
    gather_queries(call, item, work);
    work.whole.clear(rows, call.value_width);
    for (std::int64_t i = 0; i < item.spans(); ++i) {
        visit_span(call, item, item.first_span() + i, work);
        merge(work.whole, work.span, rows, call.value_width);
    }
    finish(call, item, work.whole);
}

[[noreturn]] void refuse_block(std::int64_t sequence, std::int64_t place, std::int64_t block,
                               std::int64_t blocks) {
    throw std::invalid_argument("block_tables: entry (" + std::to_string(sequence) + ", " +
                                std::to_string(place) + ") is " + std::to_string(block) +
                                ", but the queries need it; the cache has " +
                                std::to_string(blocks) + " blocks");
}

// Every block that a query of sequence s looks at must exist.
void check_blocks(const Call& call, std::int64_t s, std::int64_t first_key) {
    const std::int64_t last = (call.batch.contexts[s] - 1) / call.keys.block_size;
    for (std::int64_t i = first_key / call.keys.block_size; i <= last; ++i) {
        const std::int32_t block = call.batch.block_tables[s * call.batch.table_width + i];
        if (block < 0 || block >= call.keys.blocks) refuse_block(s, i, block, call.keys.blocks);
    }
}

// The work of the call, the longest items first, so that threads finish together.
std::vector<Item> plan(const Call& call) {
    std::vector<Item> items;
    const std::int64_t step = std::max<std::int64_t>(1, kTileRows / call.group);
    for (std::int64_t s = 0; s < call.batch.sequences; ++s) {
        const std::int64_t queries = call.batch.query_starts[s + 1] - call.batch.query_starts[s];
        if (queries == 0) continue;
        Item item{s, 0, 0, 0, 0, 0};
        check_blocks(call, s, call.first_visible(call.position(item, 0)));
        for (item.kv_head = 0; item.kv_head < call.keys.heads; ++item.kv_head)
            for (std::int64_t end = queries; end > 0; end = item.first_query) {
                item.first_query = (end - 1) / step * step;
                item.queries = end - item.first_query;
                item.first_key = call.first_visible(call.position(item, item.first_query));
                item.last_key = call.position(item, end - 1) + 1;
                items.push_back(item);
            }
    }
    return items;
}

// Few items over long contexts: every span is a task, and the parts are merged afterwards.
void by_spans(Pool& pool, const Call& call, const std::vector<Item>& items) {
    struct Part {
        std::int64_t item, span, offset;
    };
    std::vector<Part> parts;
    std::vector<std::int64_t> offsets;
    std::int64_t floats = 0;
    for (std::size_t i = 0; i < items.size(); ++i) {
        offsets.push_back(floats);
        for (std::int64_t span = 0; span < items[i].spans(); ++span) {
            parts.push_back({static_cast<std::int64_t>(i), items[i].first_span() + span, floats});
            floats += padded(Softmax::floats(call.rows(items[i]), call.value_width));
        }
    }
    Scratch memory;
    float* const base = memory.take(floats);
    pool.run(static_cast<std::int64_t>(parts.size()), [&](std::int64_t task, int) {
        const Part& part = parts[static_cast<std::size_t>(task)];
        const Item& item = items[static_cast<std::size_t>(part.item)];
        Workspace work(call, call.rows(item));
        gather_queries(call, item, work);
        work.span = Softmax::in(base + part.offset, call.rows(item), call.value_width);
        visit_span(call, item, part.span, work);
    });
    pool.ranges(static_cast<std::int64_t>(items.size()), 4,
                [&](std::int64_t begin, std::int64_t end, int) {
                    for (std::int64_t i = begin; i < end; ++i) {
                        const Item& item = items[static_cast<std::size_t>(i)];
                        const std::int64_t rows = call.rows(item);
                        const Workspace work(call, rows);
                        work.whole.clear(rows, call.value_width);
                        float* at = base + offsets[static_cast<std::size_t>(i)];
                        for (std::int64_t span = 0; span < item.spans(); ++span) {
                            merge(work.whole, Softmax::in(at, rows, call.value_width), rows,
                                  call.value_width);
                            at += padded(Softmax::floats(rows, call.value_width));
                        }
                        finish(call, item, work.whole);
                    }
                });
}

}  // namespace

void attention(Pool& pool, const Rows<const float>& q, const CacheView& keys,
               const CacheView& values, const AttentionBatch& batch, const AttentionRule& rule,
               float* out) {
    const Call call{q,
                    keys,
                    values,
                    batch,
                    rule,
                    out,
                    q.heads / keys.heads,
                    padded(keys.width),
                    padded(values.width)};
    const std::vector<Item> items = plan(call);
    std::int64_t work = 0, spans = 0;  // multiplications; spans of the longest item
    for (const Item& item : items) {
        work += call.rows(item) * (item.last_key - item.first_key) * 2 * call.key_width;
        spans = std::max(spans, item.spans());
    }
    constexpr std::int64_t worth_a_region = 1 << 17;  // multiplications, some microseconds
    const auto count = static_cast<std::int64_t>(items.size());
    if (work < worth_a_region || pool.size() == 1) {
        for (const Item& item : items) whole_item(call, item);
    } else if (count < 2 * pool.size() && spans > 1) {
        by_spans(pool, call, items);
    } else {
        pool.run(count, [&](std::int64_t task, int) {
            whole_item(call, items[static_cast<std::size_t>(task)]);
        });
    }
}

}  // namespace greenroom
