#include "matmul/kernels.h"

#include "matmul/expand.h"
#include "matmul/tile.h"

namespace greenroom {
namespace {

using namespace formats;

constexpr int type_limit = 64;

struct Table {
    Kernels of[type_limit];
};

template <class F>
void add_quantised(Table& table) {
    Kernels& k = table.of[F::type] = {{}, expand_of<F>, expanded_parts<F>};
    unrolled<std::size(simd::tile_widths)>(
        [&](auto i) { k.tiles[i] = tile_quantised<F, simd::tile_widths[i]>; });
}

template <class F>
void add_floats(Table& table) {
    Kernels& k = table.of[F::type] = {{}, expand_of<F>, expanded_parts<F>};
    unrolled<std::size(simd::tile_widths)>(
        [&](auto i) { k.tiles[i] = tile_floats<F, simd::tile_widths[i]>; });
}

template <class... Q, class... F>
Table make_table(List<Q...>, List<F...>) {
    Table table{};
    (add_quantised<Q>(table), ...);
    (add_floats<F>(table), ...);
    return table;
}

}  // namespace

const Kernels& kernels_of(int type) {
    static const Table table = make_table(Quantised{}, Floating{});
    static const Kernels none;
    return type >= 0 && type < type_limit ? table.of[type] : none;
}

}  // namespace greenroom
