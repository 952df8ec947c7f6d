#include "matmul/kernels.h"

#include "matmul/expand.h"
#include "matmul/tile.h"

namespace greenroom {
namespace {

using namespace formats;

constexpr int type_limit = 64;
constexpr int four = simd::any_width ? simd::wide_tile : 4;

struct Table {
    Kernels of[type_limit];
};

template <class F>
void add_quantised(Table& table) {
    table.of[F::type] = {tile_quantised<F, 1>, tile_quantised<F, four>,
                         tile_quantised<F, simd::wide_tile>, expand_of<F>, expanded_parts<F>};
}

template <class F>
void add_floats(Table& table) {
    table.of[F::type] = {tile_floats<F, 1>, tile_floats<F, 4>, tile_floats<F, simd::wide_tile>,
                         expand_of<F>, expanded_parts<F>};
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
