// Singular values of all channel slices of folded weights, for all group counts.
#pragma once
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

// Fills in every problem's `out` on `threads` threads. single: in float32, with float64 where that will not do.
// Throws std::runtime_error for values that are not finite or too large to square, and where an iteration does not
// converge. Throws std::bad_alloc. Needs load_blas.
void spectra(const std::vector<SpectraProblem>& problems, bool single, int threads);

}  // namespace alds
