// Singular values of all channel slices of folded weights, for all group counts.
#pragma once
#include <vector>

#include "singular_values.h"

namespace alds {

// Fills in every problem's `out` on `threads` threads. float32: in float32, with float64 where that will not do.
// Throws std::runtime_error for values that are not finite or too large to square, and where an iteration does not
// converge. Throws std::bad_alloc. Needs load_blas.
void spectra(const std::vector<SpectraProblem>& problems, bool float32, int threads);

}  // namespace alds
