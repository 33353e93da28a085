// Orthonormal basis of the space of a slice that is kept: sketched, or exact where a sketch will not do.
#pragma once
#include <cstdint>
#include <limits>
#include <vector>

#include "buffer.h"
#include "matrix.h"

namespace alds {

struct RsvdOptions {
  uint64_t seed;
  int64_t oversample;      // columns of the sketch beyond the rank
  int64_t max_iterations;  // power iterations before the exact decomposition takes over
  double tolerance;        // the squared error may exceed the optimum by this share
  double exact_fraction;   // of the order: sketches wider than this do not pay; 0: no sketches, no float32
};

constexpr int64_t EXACT_BY_CHOICE = -1;    // rank too close to full for a sketch to pay
constexpr int64_t EXACT_BY_FALLBACK = -2;  // the certificate was not met in max_iterations

// The certificate of a slice, in squared Frobenius norms.
struct Target {
  double total, optimum, tolerance;  // of the slice, the least possible error, see RsvdOptions

  bool met(double error, int64_t order) const {
    return error <= (1.0 + tolerance) * optimum + order * std::numeric_limits<double>::epsilon() * total;
  }
};

// Memory of a thread. `factor` holds the result of basis_of; everything else is free between calls.
template <typename T>
struct Workspace {
  BufferOf<T> gram, basis, image, small, values, work, scratch, factor;
  std::vector<int> integers;

  int* integer(size_t size) {
    if (integers.size() < size) integers.resize(size);
    return integers.data();
  }
};

// Basis of the smaller side of a slice that is not zero into w.factor (order x rank, column-major), computed in T:
// float or double. `stream` makes the sketch one of its own. Returns the power iterations, or EXACT_*. Throws
// std::runtime_error if a LAPACK routine fails, and std::bad_alloc.
template <typename T>
int64_t basis_of(const Slice& slice, int64_t rank, const Target& target, const RsvdOptions& options, uint64_t stream,
                 Workspace<T>& w);

}  // namespace alds
