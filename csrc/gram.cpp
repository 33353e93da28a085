// Gram matrix of a slice of float32 or float64, accumulated in float64 or float32.
//
// The slice is packed a chunk at a time. A row of the pack holds one entry of every row (or column) of the smaller
// side. The product is then a sum of outer products of contiguous rows. scipy's BLAS chooses its kernels by processor
// model and takes AVX2 ones on many AVX-512 machines. These loops take the vectors that the processor has.
#include "gram.h"

#include <algorithm>

#include "blocks.h"
#include "vector.h"

namespace alds {
namespace {

constexpr int64_t CHUNK = 1 << 18;  // bytes packed at a time, stay in L2
template <typename T>
constexpr int64_t DEPTH = sizeof(T) == sizeof(float) ? 128 : CHUNK;  // terms of a sum in T: their rounding adds up

// G[i, j] += sum_k pack[k, i] pack[k, j] for ROWS blocks of rows from i and columns j .. j + COLS
template <int ROWS, typename T>
ALDS_INLINE void outer_block(int64_t i, int64_t j, int64_t depth, const T* pack, int64_t stride, T* g, int64_t ld) {
  Line<T> sum[ROWS][COLS] = {};
  for (int64_t k = 0; k < depth; ++k, pack += stride) {
#pragma GCC unroll 8
    for (int64_t c = 0; c < COLS; ++c)
#pragma GCC unroll 2
      for (int r = 0; r < ROWS; ++r) sum[r][c] += at(pack + i + r * lanes<T>) * pack[j + c];
  }
  for (int r = 0; r < ROWS; ++r)
    for (int64_t c = 0; c < COLS; ++c) at(g + (j + c) * ld + i + r * lanes<T>) += sum[r][c];
}

template <typename T>
ALDS_INLINE void outer_of(int64_t end, int64_t depth, const T* pack, T* g, int64_t ld) {
  for (int64_t j = 0; j < end; j += COLS) {
    int64_t i = block_start<T>(j);
    for (; i + 2 * lanes<T> <= end; i += 2 * lanes<T>) outer_block<2>(i, j, depth, pack, end, g, ld);
    if (i < end) outer_block<1>(i, j, depth, pack, end, g, ld);
  }
}

// (Clones of a template are more than the compiler knows how to make.)
ALDS_CLONES void outer(int64_t end, int64_t depth, const double* pack, double* g, int64_t ld) {
  outer_of(end, depth, pack, g, ld);
}
ALDS_CLONES void outer(int64_t end, int64_t depth, const float* pack, float* g, int64_t ld) {
  outer_of(end, depth, pack, g, ld);
}

// pack[k, i] = source[i, k] scale
template <typename S, typename T>
void pack_transposed(const S* source, int64_t stride, int64_t rows, int64_t depth, int64_t end, double scale, T* pack) {
  for (int64_t block = 0; block < depth; block += 16)  // a cache line of float32 of every row at a time
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t k = block; k < std::min(depth, block + 16); ++k)
        pack[k * end + i] = static_cast<T>(source[i * stride + k] * scale);
}

// pack[k, i] = source[k, i] scale
template <typename S, typename T>
void pack_rows(const S* source, int64_t stride, int64_t width, int64_t depth, int64_t end, double scale, T* pack) {
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t i = 0; i < width; ++i) pack[k * end + i] = static_cast<T>(source[k * stride + i] * scale);
}

template <typename S, typename T>
void gram_of(const Slice& slice, double scale, T* g, BufferOf<T>& scratch) {
  const MatrixBatch& m = *slice.matrix;
  const S* base = static_cast<const S*>(m.data) + slice.offset();
  const bool wide = slice.wide();
  const int64_t order = slice.order(), end = whole_blocks<T>(order), ld = padded<T>(order);
  const int64_t total = wide ? slice.width : m.rows, chunk = CHUNK / sizeof(T) / end;
  const int64_t step = std::min(DEPTH<T>, std::clamp<int64_t>(chunk, 16, std::max<int64_t>(total, 16)));
  T* pack = grow(scratch, end * step);
  std::fill(pack, pack + end * step, T{});
  std::fill(g, g + ld * end, T{});
  for (int64_t start = 0; start < total; start += step) {
    const int64_t depth = std::min(step, total - start);
    if (wide) pack_transposed(base + start, m.cols, order, depth, end, scale, pack);
    else pack_rows(base + start * m.cols, m.cols, order, depth, end, scale, pack);
    outer(end, depth, pack, g, ld);
  }
}

}  // namespace

template <typename T>
void gram(const Slice& slice, double scale, T* g, BufferOf<T>& scratch) {
  if (slice.matrix->is_double) gram_of<double>(slice, scale, g, scratch);
  else gram_of<float>(slice, scale, g, scratch);
}

template void gram(const Slice&, double, double*, BufferOf<double>&);
template void gram(const Slice&, double, float*, BufferOf<float>&);

}  // namespace alds
