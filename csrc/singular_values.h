// Singular values of channel slices, all in one type of arithmetic.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "matrix.h"

namespace alds {

// One weight. `out` is the caller's.
struct SpectraProblem {
  MatrixBatch matrix;
  std::vector<int64_t> groups;  // each divides matrix.cols
  double* out;                  // batch x sum_k k * min(rows, cols / k), descending within a slice
};

// Singular values of a matrix that is cut into `groups` slices.
inline int64_t values_per_item(const MatrixBatch& matrix, int64_t groups) {
  return groups * std::min(matrix.rows, matrix.cols / groups);
}

// Length of a row of `out`.
inline int64_t row_size(const SpectraProblem& problem) {
  int64_t size = 0;
  for (int64_t k : problem.groups) size += values_per_item(problem.matrix, k);
  return size;
}

// By how much the squared values of a slice missed its squared norm, which they are scaled to.
struct Miss {
  int problem, entry;  // of problems, of its groups
  double share;        // of the squared norm; 0 in float64, where no norm is computed; NaN if the values are
};

// Fills in every problem's `out` on `threads` threads. Returns a Miss for every slice.
// Gram matrices and their tridiagonal forms are computed in T, float or double. The rest is float64.
// Throws std::runtime_error for values that are not finite or too large to square, and where an iteration does not
// converge. Throws std::bad_alloc.
template <typename T>
std::vector<Miss> singular_values(const std::vector<SpectraProblem>& problems, int threads);

}  // namespace alds
