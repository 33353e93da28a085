// Householder tridiagonalisation of a symmetric matrix, blocked (Dongarra, Hammarling, Sorensen, "Block reduction of
// matrices to condensed forms", 1989). It computes what LAPACK's dsytrd computes. It is faster at the orders of channel
// slices because every loop runs over whole aligned vectors.
#include "tridiagonal.h"

#include <algorithm>

#include "blocks.h"
#include "reflector.h"

namespace alds {
namespace {

// out[c] = sum_i m[i, c] x[i] over rows begin .. end; m and out have room for whole blocks of columns
template <typename T>
ALDS_INLINE void dots(int64_t begin, int64_t end, int64_t cols, const T* m, int64_t ld, const T* x, T* out) {
  for (int64_t c = 0; c < cols; c += COLS) {
    Line<T> sum[COLS] = {};
    for (int64_t i = begin; i < end; i += lanes<T>) {
      const Line<T> xi = at(x + i);
#pragma GCC unroll 8
      for (int64_t k = 0; k < COLS; ++k) sum[k] += at(m + (c + k) * ld + i) * xi;
    }
    eight(out + c) = sums<T>(sum);
  }
}

// y[i] -= sum_c m[i, c] x[c stride] over rows begin .. end
template <typename T>
ALDS_INLINE void subtract(int64_t begin, int64_t end, int64_t cols, const T* m, int64_t ld, const T* x, int64_t stride,
                          T* y) {
  int64_t c = 0;
  for (; c + 4 <= cols; c += 4) {
    const T* column = m + c * ld;
    const T x0 = x[c * stride], x1 = x[(c + 1) * stride], x2 = x[(c + 2) * stride], x3 = x[(c + 3) * stride];
    for (int64_t i = begin; i < end; i += lanes<T>)
      at(y + i) -= (at(column + i) * x0 + at(column + ld + i) * x1) +
                   (at(column + 2 * ld + i) * x2 + at(column + 3 * ld + i) * x3);
  }
  for (; c < cols; ++c) {
    const T x0 = x[c * stride];
    for (int64_t i = begin; i < end; i += lanes<T>) at(y + i) -= at(m + c * ld + i) * x0;
  }
}

// y = A x over rows and columns begin .. end, A symmetric: lower triangle by blocks
template <typename T>
ALDS_INLINE void symv(int64_t begin, int64_t end, const T* a, int64_t ld, const T* x, T* y) {
  for (int64_t i = begin; i < end; i += lanes<T>) at(y + i) = Line<T>{};
  for (int64_t j = begin; j < end; j += lanes<T>) {
    Line<T> diagonal = Line<T>{};
#pragma GCC unroll 16
    for (int64_t c = 0; c < lanes<T>; ++c) diagonal += at(a + (j + c) * ld + j) * x[j + c];
    at(y + j) += diagonal;
    for (int64_t k = j; k < j + lanes<T>; k += COLS) {
      const T* block = a + k * ld;
      Line<T> sum[COLS] = {};
      for (int64_t i = j + lanes<T>; i < end; i += lanes<T>) {
        const Line<T> xi = at(x + i);
        Line<T> even = Line<T>{}, odd = Line<T>{};
#pragma GCC unroll 8
        for (int64_t c = 0; c < COLS; c += 2) {
          const Line<T> m0 = at(block + c * ld + i), m1 = at(block + (c + 1) * ld + i);
          sum[c] += m0 * xi;
          sum[c + 1] += m1 * xi;
          even += m0 * x[k + c];
          odd += m1 * x[k + c + 1];
        }
        at(y + i) += even + odd;
      }
      eight(y + k) += sums<T>(sum);
    }
  }
}

// Reduce columns first .. first + width: their reflectors v replace them below the diagonal, w holds the other factor
// of the update A -= V W^T + W V^T. Rows before the current one in its block hold finite leftovers that are never used.
template <typename T>
ALDS_INLINE void panel_of(int64_t n, int64_t end, int64_t first, int64_t width, T* a, int64_t ld, T* w, T* x, T* small,
                          T* diagonal, T* off_diagonal, T* tau) {
  const T* v = a + first * ld;
  for (int64_t c = 0; c < width; ++c) {
    const int64_t j = first + c, begin = block_start<T>(j), next = block_start<T>(j + 1), rest = n - j - 1;
    T *column = a + j * ld, *y = w + c * ld;
    subtract(begin, end, c, v, ld, w + j, ld, column);
    subtract(begin, end, c, w, ld, v + j, ld, column);
    diagonal[j] = column[j];
    if (rest == 0) return;
    std::fill(x + next, x + j + 1, T{});
    std::copy(column + j + 1, column + end, x + j + 1);
    tau[j] = reflector(rest, x + j + 1, off_diagonal[j]);
    std::copy(x + j + 1, x + n, column + j + 1);
    symv(next, end, a, ld, x, y);
    dots(next, end, c, w, ld, x, small);
    subtract(next, end, c, v, ld, small, 1, y);
    dots(next, end, c, v, ld, x, small);
    subtract(next, end, c, w, ld, small, 1, y);
    T inner = 0;
#pragma omp simd reduction(+ : inner)
    for (int64_t i = next; i < end; ++i) inner += y[i] * x[i];
    const T half = T(-0.5) * tau[j] * tau[j] * inner;
    for (int64_t i = next; i < end; i += lanes<T>) at(y + i) = tau[j] * at(y + i) + half * at(x + i);
  }
}

// ROWS blocks of rows from i, columns j .. j + COLS: A -= V W^T + W V^T
template <int ROWS, typename T>
ALDS_INLINE void update_block(int64_t i, int64_t j, int64_t width, T* a, const T* v, const T* w, int64_t ld) {
  Line<T> sum[ROWS][COLS] = {};
  for (int64_t k = 0; k < width; ++k, v += ld, w += ld) {
#pragma GCC unroll 8
    for (int64_t c = 0; c < COLS; ++c) {
#pragma GCC unroll 2
      for (int r = 0; r < ROWS; ++r) sum[r][c] += at(v + i + r * lanes<T>) * w[j + c];
#pragma GCC unroll 2
      for (int r = 0; r < ROWS; ++r) sum[r][c] += at(w + i + r * lanes<T>) * v[j + c];
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int64_t c = 0; c < COLS; ++c) at(a + (j + c) * ld + i + r * lanes<T>) -= sum[r][c];
}

template <typename T>
ALDS_INLINE void update_of(int64_t begin, int64_t end, int64_t width, T* a, const T* v, const T* w, int64_t ld) {
  for (int64_t j = begin; j < end; j += COLS) {
    int64_t i = block_start<T>(j);
    for (; i + 2 * lanes<T> <= end; i += 2 * lanes<T>) update_block<2>(i, j, width, a, v, w, ld);
    if (i < end) update_block<1>(i, j, width, a, v, w, ld);
  }
}

// (Clones of a template are more than the compiler knows how to make.)
#define ALDS_FOR(T)                                                                                                    \
  ALDS_CLONES void panel(int64_t n, int64_t end, int64_t first, int64_t width, T* a, int64_t ld, T* w, T* x, T* small, \
                         T* diagonal, T* off_diagonal, T* tau) {                                                       \
    panel_of<T>(n, end, first, width, a, ld, w, x, small, diagonal, off_diagonal, tau);                                \
  }                                                                                                                    \
  ALDS_CLONES void update(int64_t begin, int64_t end, int64_t width, T* a, const T* v, const T* w, int64_t ld) {       \
    update_of<T>(begin, end, width, a, v, w, ld);                                                                      \
  }
ALDS_FOR(double)
ALDS_FOR(float)
#undef ALDS_FOR

}  // namespace

template <typename T>
void rank_two_update(int64_t begin, int64_t end, int64_t width, T* a, const T* v, const T* w, int64_t ld) {
  update(begin, end, width, a, v, w, ld);
}

template <typename T>
void tridiagonalise(T* a, int64_t n, T* diagonal, T* off_diagonal, T* tau, BufferOf<T>& scratch) {
  const int64_t ld = padded<T>(n), end = whole_blocks<T>(n), width = n <= 96 ? 16 : 32;
  T* w = grow(scratch, ld * width + ld + width);
  T *x = w + ld * width, *small = x + ld;
  std::fill(w, small + width, T{});
  for (int64_t first = 0; first < n; first += width) {
    panel(n, end, first, std::min(width, n - first), a, ld, w, x, small, diagonal, off_diagonal, tau);
    if (first + width < n) update(first + width, end, width, a, a + first * ld, w, ld);
  }
}

template void tridiagonalise(double*, int64_t, double*, double*, double*, BufferOf<double>&);
template void tridiagonalise(float*, int64_t, float*, float*, float*, BufferOf<float>&);
template void rank_two_update(int64_t, int64_t, int64_t, double*, const double*, const double*, int64_t);
template void rank_two_update(int64_t, int64_t, int64_t, float*, const float*, const float*, int64_t);

}  // namespace alds
