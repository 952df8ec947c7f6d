// The operations of attention layers and routers, as Python sees them. Everything an operation
// takes for granted is checked here, with the GIL held; the operation runs without it.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <vector>

#include "bindings.h"
#include "ops/attention.h"
#include "ops/router.h"
#include "ops/rows.h"
#include "tensor.h"
#include "threads/pool.h"

namespace nb = nanobind;

namespace greenroom {
namespace {

using Shape = std::initializer_list<std::int64_t>;

// float32 (tokens, width) or (tokens, heads, width); only the last dimension must be dense.
template <class T>
Rows<T> rows_of(const Tensor& t, const char* name) {
    if (t.dims != 2 && t.dims != 3) refuse(name, "expected 2 or 3 dimensions");
    Rows<T> rows;
    rows.data = t.dims == 2 ? data_of<float>(t, name, {-1, -1}, 1)
                            : data_of<float>(t, name, {-1, -1, -1}, 1);
    rows.tokens = t.shape[0];
    rows.token_stride = t.strides[0];
    rows.heads = t.dims == 3 ? t.shape[1] : 1;
    rows.head_stride = t.dims == 3 ? t.strides[1] : 0;
    rows.width = t.shape[t.dims - 1];
    if (rows.width < 1) refuse(name, "rows are empty");
    return rows;
}

template <class T>
Rows<const T> constant(const Rows<T>& r) {
    return {r.data, r.tokens, r.heads, r.width, r.token_stride, r.head_stride};
}

template <class A, class B>
void expect_same(const Rows<A>& a, const Rows<B>& b, const char* name) {
    if (a.tokens != b.tokens || a.heads != b.heads || a.width != b.width)
        refuse(name, "shape differs from that of x");
}

const float* optional_data(const std::optional<Tensor>& t, const char* name, Shape shape) {
    return t ? data_of<float>(*t, name, shape) : nullptr;
}

CacheView cache_of(const Tensor& t, const char* name) {
    expect_shape(t, name, {-1, -1, -1, -1});
    CacheView cache{t.data, is_half(t), t.shape[0], t.shape[1], t.shape[2], t.shape[3]};
    if (!cache.half) data_of<float>(t, name, {-1, -1, -1, -1});
    std::int64_t stride = 1;
    for (int i = 3; i >= 0; --i) {
        if (t.shape[i] > 1 && t.strides[i] != stride) refuse(name, "must be contiguous");
        stride *= t.shape[i];
    }
    if (cache.heads < 1 || cache.block_size < 1 || cache.width < 1) refuse(name, "is empty");
    return cache;
}

void bind_norm(Pool& pool, const OutTensor& x, const NormWeights& weights,
               const std::optional<Tensor>& residual, const OutTensor& out) {
    const Rows<float> rows = rows_of<float>(x, "x"), to = rows_of<float>(out, "out");
    expect_same(rows, to, "out");
    Rows<const float> added;
    if (residual) {
        added = rows_of<const float>(*residual, "residual");
        expect_same(rows, added, "residual");
    }
    nb::gil_scoped_release release;
    norm(pool, rows, residual ? &added : nullptr, weights, to);
}

std::int64_t width_of(const Tensor& x) { return x.dims > 0 ? x.shape[x.dims - 1] : 0; }

void rms_norm(Pool& pool, const OutTensor& x, const Tensor& weight, float eps, const OutTensor& out,
              const std::optional<Tensor>& residual) {
    const float* w = data_of<float>(weight, "weight", {width_of(x)});
    bind_norm(pool, x, {w, nullptr, eps, false}, residual, out);
}

void layer_norm(Pool& pool, const OutTensor& x, const Tensor& weight,
                const std::optional<Tensor>& bias, float eps, const OutTensor& out,
                const std::optional<Tensor>& residual) {
    const float* w = data_of<float>(weight, "weight", {width_of(x)});
    const float* b = optional_data(bias, "bias", {width_of(x)});
    bind_norm(pool, x, {w, b, eps, true}, residual, out);
}

void bind_rope_table(Pool& pool, const Tensor& positions, const Tensor& inv_freq, float magnitude,
                     const OutTensor& out) {
    const auto* p = data_of<std::int64_t>(positions, "positions", {-1});
    const auto* f = data_of<float>(inv_freq, "inv_freq", {-1});
    const std::int64_t tokens = positions.shape[0], pairs = inv_freq.shape[0];
    float* table = data_of<float>(out, "out", {tokens, 2, pairs});
    nb::gil_scoped_release release;
    rope_table(pool, p, tokens, f, pairs, magnitude, table);
}

void bind_rope(Pool& pool, const OutTensor& x, const Tensor& table, const std::string& style) {
    const Rows<float> rows = rows_of<float>(x, "x");
    const float* angles = data_of<float>(table, "table", {rows.tokens, 2, -1});
    const std::int64_t pairs = table.shape[2];
    if (2 * pairs > rows.width) refuse("table", "rotates more elements than a row of x has");
    if (style != "neox" && style != "norm") refuse("style", "expected 'neox' or 'norm'");
    nb::gil_scoped_release release;
    rope(pool, rows, angles, pairs, style == "neox");
}

void write_kv(Pool& pool, const Tensor& k, const Tensor& v, const Tensor& slots,
              const OutTensor& k_cache, const OutTensor& v_cache) {
    const Rows<const float> keys = constant(rows_of<float>(k, "k"));
    const Rows<const float> values = constant(rows_of<float>(v, "v"));
    const CacheView kc = cache_of(k_cache, "k_cache"), vc = cache_of(v_cache, "v_cache");
    if (keys.heads != kc.heads || keys.width != kc.width) refuse("k", "does not fit k_cache");
    if (values.heads != vc.heads || values.width != vc.width) refuse("v", "does not fit v_cache");
    if (values.tokens != keys.tokens) refuse("v", "number of tokens differs from that of k");
    const auto* where = data_of<std::int64_t>(slots, "slots", {keys.tokens});
    const std::int64_t limit = std::min(kc.blocks * kc.block_size, vc.blocks * vc.block_size);
    for (std::int64_t t = 0; t < keys.tokens; ++t)
        if (where[t] < 0 || where[t] >= limit)
            refuse("slots", "entry " + std::to_string(t) + " is " + std::to_string(where[t]) +
                                "; the caches have " + std::to_string(limit) + " slots");
    nb::gil_scoped_release release;
    write_cache(pool, keys, where, kc);
    write_cache(pool, values, where, vc);
}

AttentionBatch batch_of(const Tensor& block_tables, const Tensor& query_starts,
                        const Tensor& contexts, std::int64_t tokens, std::int64_t block_size) {
    AttentionBatch batch;
    batch.sequences = contexts.dims == 1 ? contexts.shape[0] : 0;
    batch.contexts = data_of<std::int32_t>(contexts, "context_lengths", {-1});
    batch.query_starts = data_of<std::int32_t>(query_starts, "query_starts", {batch.sequences + 1});
    batch.block_tables = data_of<std::int32_t>(block_tables, "block_tables", {batch.sequences, -1});
    batch.table_width = block_tables.shape[1];
    if (batch.query_starts[0] != 0 || batch.query_starts[batch.sequences] != tokens)
        refuse("query_starts", "must run from 0 to the number of rows of q");
    for (std::int64_t s = 0; s < batch.sequences; ++s) {
        const std::int64_t queries =
            std::int64_t{batch.query_starts[s + 1]} - batch.query_starts[s];
        if (queries < 0) refuse("query_starts", "must not decrease");
        if (batch.contexts[s] < queries)
            refuse("context_lengths", "shorter than the queries of the sequence");
        if (queries > 0 && batch.contexts[s] > batch.table_width * block_size)
            refuse("context_lengths", "longer than the blocks of the sequence");
    }
    return batch;
}

void bind_attention(Pool& pool, const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                    const Tensor& block_tables, const Tensor& query_starts,
                    const Tensor& context_lengths, float scale, std::optional<std::int64_t> window,
                    const std::optional<Tensor>& sinks, const OutTensor& out) {
    if (q.dims != 3) refuse("q", "expected 3 dimensions");
    const Rows<const float> queries = constant(rows_of<float>(q, "q"));
    const CacheView keys = cache_of(k_cache, "k_cache"), values = cache_of(v_cache, "v_cache");
    if (keys.width != queries.width) refuse("q", "its rows do not fit those of k_cache");
    expect_shape(v_cache, "v_cache", {keys.blocks, keys.heads, keys.block_size, -1});
    if (keys.half != values.half) refuse("v_cache", "type differs from that of k_cache");
    if (queries.heads < 1 || queries.heads % keys.heads != 0)
        refuse("q", "heads are no multiple of those of k_cache");
    if (window && *window < 1) refuse("window", "must be at least 1");
    const AttentionBatch batch =
        batch_of(block_tables, query_starts, context_lengths, queries.tokens, keys.block_size);
    const AttentionRule rule{scale, window.value_or(0),
                             optional_data(sinks, "sinks", {queries.heads})};
    float* to = data_of<float>(out, "out", {queries.tokens, queries.heads, values.width});
    nb::gil_scoped_release release;
    attention(pool, queries, keys, values, batch, rule, to);
}

void bind_router(Pool& pool, const Tensor& x, const Tensor& weight,
                 const std::optional<Tensor>& bias, const std::optional<Tensor>& selection_bias,
                 const RouterRule& rule, const OutTensor& ids, const OutTensor& weights) {
    if (x.dims != 2) refuse("x", "expected 2 dimensions");
    const Rows<const float> rows = constant(rows_of<float>(x, "x"));
    RouterWeights w{data_of<float>(weight, "weight", {-1, rows.width}), nullptr, nullptr,
                    weight.shape[0]};
    w.bias = optional_data(bias, "bias", {w.experts});
    w.selection_bias = optional_data(selection_bias, "selection_bias", {w.experts});
    if (w.experts % rule.groups != 0) refuse("weight", "experts do not divide into the groups");
    if (rule.selected > w.experts / rule.groups * rule.groups_used)
        refuse("weight", "has fewer experts than the rule selects");
    auto* to_ids = data_of<std::int32_t>(ids, "ids", {rows.tokens, rule.selected});
    float* to = data_of<float>(weights, "weights", {rows.tokens, rule.selected});
    nb::gil_scoped_release release;
    std::vector<float> logits(static_cast<std::size_t>(rows.tokens * w.experts));
    router(pool, rows, w, rule, logits.data(), to_ids, to);
}

Gating gating_of(const std::string& name) {
    if (name == "softmax") return Gating::softmax;
    if (name == "softmax_selected") return Gating::softmax_selected;
    if (name == "sigmoid") return Gating::sigmoid;
    if (name == "sparse_mixer") return Gating::sparse_mixer;
    refuse("gating", "expected softmax, softmax_selected, sigmoid or sparse_mixer, not " + name);
}

void make_rule(RouterRule* self, const std::string& gating, std::int64_t selected, bool renormalize,
               float scale, std::int64_t groups, std::int64_t groups_used, float jitter) {
    if (selected < 1) refuse("selected", "must be at least 1");
    if (groups < 1) refuse("groups", "must be at least 1");
    if (groups_used < 1 || groups_used > groups) refuse("groups_used", "must be in 1..groups");
    new (self)
        RouterRule{gating_of(gating), selected, renormalize, scale, groups, groups_used, jitter};
    if (self->gating == Gating::sparse_mixer && (selected != 2 || groups != 1))
        refuse("gating", "sparse_mixer selects 2 experts, without groups");
}

}  // namespace

void bind_ops(nb::module_& m) {
    using nb::arg;
    m.def("rms_norm", &rms_norm, arg("pool"), arg("x"), arg("weight"), arg("eps"), arg("out"),
          arg("residual").none() = nb::none());
    m.def("layer_norm", &layer_norm, arg("pool"), arg("x"), arg("weight"), arg("bias").none(),
          arg("eps"), arg("out"), arg("residual").none() = nb::none());
    m.def("rope_table", &bind_rope_table, arg("pool"), arg("positions"), arg("inv_freq"),
          arg("magnitude"), arg("out"));
    m.def("rope", &bind_rope, arg("pool"), arg("x"), arg("table"), arg("style"));
    m.def("write_kv", &write_kv, arg("pool"), arg("k"), arg("v"), arg("slots"), arg("k_cache"),
          arg("v_cache"));
    m.def("attention", &bind_attention, arg("pool"), arg("q"), arg("k_cache"), arg("v_cache"),
          arg("block_tables"), arg("query_starts"), arg("context_lengths"), arg("scale"),
          arg("window").none(), arg("sinks").none(), arg("out"));
    m.def("router", &bind_router, arg("pool"), arg("x"), arg("weight"), arg("bias").none(),
          arg("selection_bias").none(), arg("rule"), arg("ids"), arg("weights"));
    nb::class_<RouterRule>(m, "RouterRule")
        .def("__init__", &make_rule, arg("gating"), arg("selected"), arg("renormalize") = false,
             arg("scale") = 1.0f, arg("groups") = 1, arg("groups_used") = 1, arg("jitter") = 0.01f)
        .def_ro("selected", &RouterRule::selected);
}

}  // namespace greenroom
