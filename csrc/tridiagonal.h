// Householder tridiagonalisation of a symmetric matrix of moderate order. T: float or double.
#pragma once
#include <cstdint>

#include "buffer.h"

namespace alds {

// Tridiagonal form of a matrix that is stored as blocks.h says and completed; its entries are at most 1.
// The matrix (n x n) is destroyed. Out come diagonal (n), off_diagonal (n - 1) and tau (n), the scalar factors of the
// n - 1 reflectors. The reflectors are left below the first subdiagonal, as LAPACK's dsytrd leaves them.
// The scratch buffer is grown as needed; growing may throw std::bad_alloc.
template <typename T>
void tridiagonalise(T* a, int64_t n, T* diagonal, T* off_diagonal, T* tau, BufferOf<T>& scratch);

// A -= V W^T + W V^T on rows and columns begin .. end of such a matrix: its lower triangle and diagonal blocks.
// V and W have `width` columns. All three have leading dimension ld. `begin` is a multiple of a vector's lanes.
// Throws nothing.
template <typename T>
void rank_two_update(int64_t begin, int64_t end, int64_t width, T* a, const T* v, const T* w, int64_t ld);

}  // namespace alds
