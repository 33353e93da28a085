// The two factors of a slice from an orthonormal basis of the space that is kept, in float64.
#pragma once
#include <cstdint>

#include "buffer.h"
#include "matrix.h"

namespace alds {

// A basis (order x rank, column-major) that was computed in float32, in float64 and with columns of norm 1 again.
// Its columns are not quite orthogonal. That changes the squared error by the square of float32's epsilon.
// Throws nothing.
void widen(const float* narrow, int64_t order, int64_t rank, double* basis);

// Factors of a slice of norm `norm`, projected onto the space of a basis (order x rank, column-major) of its smaller
// side. left is rows x rank and right is rank x width, both row-major and of the matrix's type S: float or double.
// Both carry the root of the singular values. Returns the squared norm of the projection.
// The scratch buffer is grown as needed; growing may throw std::bad_alloc.
template <typename S>
double write_factors(const Slice& slice, int64_t rank, double norm, double* basis, Buffer& scratch, S* left, S* right);

}  // namespace alds
