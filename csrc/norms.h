// Squared norms in float64, whatever the matrix's type.
#pragma once
#include "matrix.h"

namespace alds {

// What is thrown, as a std::runtime_error, where a squared norm is not finite.
constexpr const char* NOT_FINITE = "a value is NaN, infinite or too large to square";

// Squared Frobenius norm of a slice. Throws nothing: the caller checks that the result is finite.
double squared_norm(const Slice& slice);

// Squared norm of every column of matrix `item` into squares (cols). Throws nothing.
void squared_columns(const MatrixBatch& matrix, int64_t item, double* squares);

}  // namespace alds
