// Randomized SVD of all channel slices of folded weights, with a certificate.
#pragma once
#include <cstdint>
#include <vector>

#include "basis.h"
#include "matrix.h"

namespace alds {

// One weight at one rank. Pointers are the caller's; slices lie in the order batch x groups.
struct RsvdProblem {
  MatrixBatch matrix;
  int64_t groups, rank;
  const double* optimum;  // batch*groups: least possible squared error of each slice
  void* left;             // batch*groups x rows x rank, in the matrix's type
  void* right;            // batch*groups x rank x width
  double* norm;           // batch*groups: squared Frobenius norm of each slice
  double* error;          // batch*groups: squared error reached
  int64_t* iterations;    // batch*groups: power iterations, EXACT_* where the exact decomposition ran
};

// Fills in every problem's outputs on `threads` threads. They do not depend on the number of threads.
// Throws std::runtime_error for values that are not finite or too large to square, and where a LAPACK routine fails.
// Throws std::bad_alloc. Needs load_blas.
void batched_rsvd(const std::vector<RsvdProblem>& problems, const RsvdOptions& options, int threads);

}  // namespace alds
