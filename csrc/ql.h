// Eigenvalues of tridiagonal matrices of one order, a matrix a vector lane.
#pragma once
#include <cstdint>

#include "buffer.h"

namespace alds {

// Eigenvalues of up to LANES matrices of order n, with an absolute error of about machine epsilon times the norm.
// Each diagonal[i] (n) is overwritten by them, in no order. Each off_diagonal[i] (n - 1) is only read.
// The scratch buffer is grown as needed; growing may throw std::bad_alloc. Throws std::runtime_error if the iteration
// does not converge.
void tridiagonal_eigenvalues(int64_t n, int64_t count, double* const* diagonal, const double* const* off_diagonal,
                             Buffer& scratch);

}  // namespace alds
