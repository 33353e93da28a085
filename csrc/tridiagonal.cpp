// Householder tridiagonalisation of a symmetric matrix, blocked (Dongarra, Hammarling, Sorensen, "Block reduction of
// matrices to condensed forms", 1989): what LAPACK's dsytrd computes. It is faster at the orders of channel slices because
// every loop runs over whole aligned vectors: blocks of LANES rows, padding included, diagonal blocks stored in full.
#include <algorithm>
#include <cmath>

#include "core.h"
#include "vector.h"

namespace alds {
namespace {

// Lane c of the result is the sum of x[c]'s lanes.
ALDS_INLINE Vector sums(const Vector* x) {
  static_assert(LANES == 8, "the shuffles are written for eight lanes");
  const Integers a1 = {0, 8, 2, 10, 4, 12, 6, 14}, b1 = {1, 9, 3, 11, 5, 13, 7, 15};
  const Integers a2 = {0, 1, 8, 9, 4, 5, 12, 13}, b2 = {2, 3, 10, 11, 6, 7, 14, 15};
  const Integers a3 = {0, 1, 2, 3, 8, 9, 10, 11}, b3 = {4, 5, 6, 7, 12, 13, 14, 15};
  Vector pairs[4], fours[2];
  for (int i = 0; i < 4; ++i)
    pairs[i] = __builtin_shuffle(x[2 * i], x[2 * i + 1], a1) + __builtin_shuffle(x[2 * i], x[2 * i + 1], b1);
  for (int i = 0; i < 2; ++i)
    fours[i] = __builtin_shuffle(pairs[2 * i], pairs[2 * i + 1], a2) + __builtin_shuffle(pairs[2 * i], pairs[2 * i + 1], b2);
  return __builtin_shuffle(fours[0], fours[1], a3) + __builtin_shuffle(fours[0], fours[1], b3);
}

// out[c] = sum_i m[i, c] x[i] over rows begin .. end; out has room for whole vectors
ALDS_INLINE void dots(int64_t begin, int64_t end, int64_t cols, const double* m, int64_t ld, const double* x, double* out) {
  for (int64_t c = 0; c < cols; c += LANES) {
    Vector sum[LANES] = {};
    for (int64_t i = begin; i < end; i += LANES) {
      const Vector xi = at(x + i);
#pragma GCC unroll 8
      for (int64_t k = 0; k < LANES; ++k) sum[k] += at(m + (c + k) * ld + i) * xi;
    }
    at(out + c) = sums(sum);
  }
}

// y[i] -= sum_c m[i, c] x[c stride] over rows begin .. end
ALDS_INLINE void subtract(int64_t begin, int64_t end, int64_t cols, const double* m, int64_t ld, const double* x,
                          int64_t stride, double* y) {
  int64_t c = 0;
  for (; c + 4 <= cols; c += 4) {
    const double* column = m + c * ld;
    const double x0 = x[c * stride], x1 = x[(c + 1) * stride], x2 = x[(c + 2) * stride], x3 = x[(c + 3) * stride];
    for (int64_t i = begin; i < end; i += LANES)
      at(y + i) -= (at(column + i) * x0 + at(column + ld + i) * x1) +
                   (at(column + 2 * ld + i) * x2 + at(column + 3 * ld + i) * x3);
  }
  for (; c < cols; ++c) {
    const double x0 = x[c * stride];
    for (int64_t i = begin; i < end; i += LANES) at(y + i) -= at(m + c * ld + i) * x0;
  }
}

// y = A x over rows and columns begin .. end, A symmetric: lower triangle by blocks
ALDS_INLINE void symv(int64_t begin, int64_t end, const double* a, int64_t ld, const double* x, double* y) {
  for (int64_t i = begin; i < end; i += LANES) at(y + i) = Vector{};
  for (int64_t j = begin; j < end; j += LANES) {
    const double* block = a + j * ld;
    Vector sum[LANES] = {}, diagonal = Vector{};
#pragma GCC unroll 8
    for (int64_t c = 0; c < LANES; ++c) diagonal += at(block + c * ld + j) * x[j + c];
    for (int64_t i = j + LANES; i < end; i += LANES) {
      const Vector xi = at(x + i);
      Vector even = Vector{}, odd = Vector{};
#pragma GCC unroll 8
      for (int64_t c = 0; c < LANES; c += 2) {
        const Vector m0 = at(block + c * ld + i), m1 = at(block + (c + 1) * ld + i);
        sum[c] += m0 * xi;
        sum[c + 1] += m1 * xi;
        even += m0 * x[j + c];
        odd += m1 * x[j + c + 1];
      }
      at(y + i) += even + odd;
    }
    at(y + j) += diagonal + sums(sum);
  }
}

// Reflector that maps x to (beta, 0, ..., 0); x becomes v with v[0] = 1. Returns tau.
ALDS_INLINE double reflector(int64_t n, double* x, double& beta) {
  double tail = 0;
#pragma omp simd reduction(+ : tail)
  for (int64_t i = 1; i < n; ++i) tail += x[i] * x[i];
  const double alpha = x[0];
  x[0] = 1.0;
  beta = alpha;
  if (tail < 1e-280) {  // entries are at most 1 here: these are nothing, but their squares have lost their digits
    std::fill(x + 1, x + n, 0.0);
    return 0.0;
  }
  beta = -std::copysign(std::sqrt(alpha * alpha + tail), alpha);
  const double scale = 1.0 / (alpha - beta);
#pragma omp simd
  for (int64_t i = 1; i < n; ++i) x[i] *= scale;
  return (beta - alpha) / beta;
}

ALDS_INLINE int64_t block_start(int64_t row) { return row / LANES * LANES; }

// Reduce columns first .. first + width: their reflectors v replace them below the diagonal, w holds the other factor of
// the update A -= V W^T + W V^T. Rows before the current one in its block hold finite leftovers that are never used.
ALDS_CLONES void panel(int64_t n, int64_t end, int64_t first, int64_t width, double* a, int64_t ld, double* w, double* x,
                       double* small, double* diagonal, double* off_diagonal, double* tau) {
  const double* v = a + first * ld;
  for (int64_t c = 0; c < width; ++c) {
    const int64_t j = first + c, begin = block_start(j), next = block_start(j + 1), rest = n - j - 1;
    double *column = a + j * ld, *y = w + c * ld;
    subtract(begin, end, c, v, ld, w + j, ld, column);
    subtract(begin, end, c, w, ld, v + j, ld, column);
    diagonal[j] = column[j];
    if (rest == 0) return;
    std::fill(x + next, x + j + 1, 0.0);
    std::copy(column + j + 1, column + end, x + j + 1);
    tau[j] = reflector(rest, x + j + 1, off_diagonal[j]);
    std::copy(x + j + 1, x + n, column + j + 1);
    symv(next, end, a, ld, x, y);
    dots(next, end, c, w, ld, x, small);
    subtract(next, end, c, v, ld, small, 1, y);
    dots(next, end, c, v, ld, x, small);
    subtract(next, end, c, w, ld, small, 1, y);
    double inner = 0;
#pragma omp simd reduction(+ : inner)
    for (int64_t i = next; i < end; ++i) inner += y[i] * x[i];
    const double half = -0.5 * tau[j] * tau[j] * inner;
    for (int64_t i = next; i < end; i += LANES) at(y + i) = tau[j] * at(y + i) + half * at(x + i);
  }
}

// ROWS blocks of rows from i, columns j .. j + LANES: A -= V W^T + W V^T
template <int ROWS>
ALDS_INLINE void update_block(int64_t i, int64_t j, int64_t width, double* a, const double* v, const double* w, int64_t ld) {
  Vector sum[ROWS][LANES] = {};
  for (int64_t k = 0; k < width; ++k, v += ld, w += ld) {
#pragma GCC unroll 8
    for (int64_t c = 0; c < LANES; ++c) {
#pragma GCC unroll 2
      for (int r = 0; r < ROWS; ++r) sum[r][c] += at(v + i + r * LANES) * w[j + c];
#pragma GCC unroll 2
      for (int r = 0; r < ROWS; ++r) sum[r][c] += at(w + i + r * LANES) * v[j + c];
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int64_t c = 0; c < LANES; ++c) at(a + (j + c) * ld + i + r * LANES) -= sum[r][c];
}

ALDS_CLONES void update(int64_t begin, int64_t end, int64_t width, double* a, const double* v, const double* w, int64_t ld) {
  for (int64_t j = begin; j < end; j += LANES) {
    int64_t i = j;
    for (; i + 2 * LANES <= end; i += 2 * LANES) update_block<2>(i, j, width, a, v, w, ld);
    if (i < end) update_block<1>(i, j, width, a, v, w, ld);
  }
}

}  // namespace

int64_t whole_blocks(int64_t order) { return (order + LANES - 1) / LANES * LANES; }

int64_t padded(int64_t order) {
  const int64_t end = whole_blocks(order);
  return end % 64 == 0 ? end + LANES : end;  // columns must not all start in the same cache sets
}

void complete_blocks(double* a, int64_t n) {
  const int64_t ld = padded(n), end = whole_blocks(n);
  for (int64_t j = 0; j < end; ++j) {
    std::fill(a + j * ld + (j < n ? n : block_start(j)), a + j * ld + end, 0.0);
    for (int64_t i = block_start(j); i < std::min(j, n); ++i) a[j * ld + i] = j < n ? a[i * ld + j] : 0.0;
  }
}

void tridiagonalise(double* a, int64_t n, double* diagonal, double* off_diagonal, double* tau,
                    Buffer& scratch) {
  const int64_t ld = padded(n), end = whole_blocks(n), width = n <= 96 ? 16 : 32;
  double* w = grow(scratch, ld * width + ld + width);
  double *x = w + ld * width, *small = x + ld;
  std::fill(w, small + width, 0.0);
  for (int64_t first = 0; first < n; first += width) {
    panel(n, end, first, std::min(width, n - first), a, ld, w, x, small, diagonal, off_diagonal, tau);
    if (first + width < n) update(first + width, end, width, a, a + first * ld, w, ld);
  }
}

}  // namespace alds
