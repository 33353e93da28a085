// Tridiagonal form of a large symmetric matrix, in two stages by way of a band. T: float or double.
#pragma once
#include <cstdint>

#include "buffer.h"

namespace alds {

constexpr int64_t LARGE = 1024;  // the order from which on two stages are faster than tridiagonalise

// The same as tridiagonalise, for an order above the band's width, without the reflectors.
// The matrix (n x n) is destroyed. Out come diagonal (n) and off_diagonal (n - 1).
// The scratch buffer is grown as needed; growing may throw std::bad_alloc. A failing LAPACK routine throws
// std::runtime_error.
template <typename T>
void tridiagonalise_large(T* a, int64_t n, T* diagonal, T* off_diagonal, BufferOf<T>& scratch);

}  // namespace alds
