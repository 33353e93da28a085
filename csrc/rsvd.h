// Randomized SVD of all channel slices of folded weights, with a certificate.
#pragma once
#include <cstdint>
#include <vector>

#include "matrix.h"

namespace alds {

struct RsvdOptions {
  uint64_t seed;
  int64_t oversample;      // columns of the sketch beyond the rank
  int64_t max_iterations;  // power iterations before the exact decomposition takes over
  double tolerance;        // the squared error may exceed the optimum by this share
  double exact_fraction;   // of the order: sketches wider than this do not pay; 0: no sketches, no float32
};

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

constexpr int64_t EXACT_BY_CHOICE = -1;    // rank too close to full for a sketch to pay
constexpr int64_t EXACT_BY_FALLBACK = -2;  // the certificate was not met in max_iterations

// Fills in every problem's outputs on `threads` threads. They do not depend on the number of threads.
// Throws std::runtime_error for values that are not finite or too large to square, and where a LAPACK routine fails.
// Throws std::bad_alloc. Needs load_blas.
void batched_rsvd(const std::vector<RsvdProblem>& problems, const RsvdOptions& options, int threads);

}  // namespace alds
