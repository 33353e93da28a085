// Gram matrix of a slice, accumulated in float64 from float32 or float64.
//
// The slice is packed a chunk at a time so that a row of the pack holds one entry of every row (or column) of the smaller
// side; the product is then a sum of outer products of contiguous rows. scipy's BLAS chooses its kernels by processor model
// and takes AVX2 ones on many AVX-512 machines; these loops take the vectors that the processor has.
#include <algorithm>

#include "core.h"
#include "vector.h"

namespace alds {
namespace {

constexpr int64_t CHUNK = 1 << 15;  // doubles packed at a time: 256 KiB, stays in L2

// G[i, j] += sum_k pack[k, i] pack[k, j] for ROWS blocks of rows from i and columns j .. j + LANES
template <int ROWS>
ALDS_INLINE void outer_block(int64_t i, int64_t j, int64_t depth, const double* pack, int64_t stride, double* g, int64_t ld) {
  Vector sum[ROWS][LANES] = {};
  for (int64_t k = 0; k < depth; ++k, pack += stride) {
#pragma GCC unroll 8
    for (int64_t c = 0; c < LANES; ++c)
#pragma GCC unroll 2
      for (int r = 0; r < ROWS; ++r) sum[r][c] += at(pack + i + r * LANES) * pack[j + c];
  }
  for (int r = 0; r < ROWS; ++r)
    for (int64_t c = 0; c < LANES; ++c) at(g + (j + c) * ld + i + r * LANES) += sum[r][c];
}

ALDS_CLONES void outer(int64_t end, int64_t depth, const double* pack, double* g, int64_t ld) {
  for (int64_t j = 0; j < end; j += LANES) {
    int64_t i = j;
    for (; i + 2 * LANES <= end; i += 2 * LANES) outer_block<2>(i, j, depth, pack, end, g, ld);
    if (i < end) outer_block<1>(i, j, depth, pack, end, g, ld);
  }
}

// pack[k, i] = source[i, k]
template <typename T>
void pack_transposed(const T* source, int64_t stride, int64_t rows, int64_t depth, int64_t end, double* pack) {
  for (int64_t block = 0; block < depth; block += 16)  // a cache line of float32 of every row at a time
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t k = block; k < std::min(depth, block + 16); ++k) pack[k * end + i] = source[i * stride + k];
}

// pack[k, i] = source[k, i]
template <typename T>
void pack_rows(const T* source, int64_t stride, int64_t width, int64_t depth, int64_t end, double* pack) {
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t i = 0; i < width; ++i) pack[k * end + i] = source[k * stride + i];
}

template <typename T>
void gram_of(const Slice& slice, double* g, Buffer& scratch) {
  const MatrixBatch& m = *slice.matrix;
  const T* base = static_cast<const T*>(m.data) + slice.item * m.rows * m.cols + slice.first;
  const bool wide = m.rows <= slice.width;
  const int64_t order = slice.order(), end = whole_blocks(order), ld = padded(order);
  const int64_t total = wide ? slice.width : m.rows, step = std::clamp<int64_t>(CHUNK / end, 16, std::max<int64_t>(total, 16));
  double* pack = grow(scratch, end * step);
  std::fill(pack, pack + end * step, 0.0);
  std::fill(g, g + ld * end, 0.0);
  for (int64_t start = 0; start < total; start += step) {
    const int64_t depth = std::min(step, total - start);
    if (wide) pack_transposed(base + start, m.cols, order, depth, end, pack);
    else pack_rows(base + start * m.cols, m.cols, order, depth, end, pack);
    outer(end, depth, pack, g, ld);
  }
}

}  // namespace

void gram(const Slice& slice, double* g, Buffer& scratch) {
  if (slice.matrix->is_double) gram_of<double>(slice, g, scratch);
  else gram_of<float>(slice, g, scratch);
}

}  // namespace alds
