// Storage of a symmetric matrix in whole vectors of rows, as gram, tridiagonalise and tridiagonalise_large want it.
//
// It is column-major and starts on a vector's boundary. It has whole_blocks(order) columns of leading dimension
// padded(order). The lower triangle holds the matrix. T: float or double. Nothing here throws or allocates.
#pragma once
#include <algorithm>
#include <cstdint>

#include "vector.h"

namespace alds {

// The first row of the block that holds `row`.
template <typename T>
ALDS_INLINE int64_t block_start(int64_t row) {
  return row / lanes<T> * lanes<T>;
}

// The order, rounded up to whole blocks.
template <typename T>
inline int64_t whole_blocks(int64_t order) {
  return block_start<T>(order + lanes<T> - 1);
}

// The leading dimension. Columns must not all start in the same cache sets.
template <typename T>
inline int64_t padded(int64_t order) {
  const int64_t end = whole_blocks<T>(order);
  return end * sizeof(T) % 512 == 0 ? end + lanes<T> : end;
}

// Values to allocate for a matrix.
template <typename T>
inline int64_t blocks_size(int64_t order) {
  return padded<T>(order) * whole_blocks<T>(order);
}

// Fill in what tridiagonalise needs beside the lower triangle: diagonal blocks in full, zeros in the padding.
template <typename T>
void complete_blocks(T* a, int64_t order) {
  const int64_t ld = padded<T>(order), end = whole_blocks<T>(order);
  for (int64_t j = 0; j < end; ++j) {
    std::fill(a + j * ld + (j < order ? order : block_start<T>(j)), a + j * ld + end, T{});
    for (int64_t i = block_start<T>(j); i < std::min(j, order); ++i) a[j * ld + i] = j < order ? a[i * ld + j] : T{};
  }
}

}  // namespace alds
