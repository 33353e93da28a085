// What the core works on: batches of matrices and their channel slices. Neither owns memory.
#pragma once
#include <algorithm>
#include <cstdint>

namespace alds {

// A batch of row-major matrices, batch x rows x cols, in float32 or float64.
struct MatrixBatch {
  const void* data;
  bool is_double;
  int64_t batch, rows, cols;
};

// One slice: columns [first, first + width) of matrix `item` of a batch.
struct Slice {
  const MatrixBatch* matrix;
  int64_t item, first, width;

  bool wide() const { return matrix->rows <= width; }
  int64_t order() const { return std::min(matrix->rows, width); }                // of the smaller Gram matrix
  int64_t offset() const { return item * matrix->rows * matrix->cols + first; }  // of the first entry in the batch
};

// Slice `index` of each matrix's `groups` slices of equal width; groups divides cols.
inline Slice slice_of(const MatrixBatch& matrix, int64_t groups, int64_t item, int64_t index) {
  const int64_t width = matrix.cols / groups;
  return {&matrix, item, index * width, width};
}

}  // namespace alds
