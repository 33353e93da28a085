// Tridiagonal form of a large symmetric matrix in two stages (Bischof, Lang, Sun, "A framework for symmetric band
// reduction", 2000). The first stage goes to a band by block reflectors. Their products read the matrix once for BAND
// columns and not once for each. The second stage goes from band to tridiagonal by chasing bulges in the cache.
#include "band.h"

#include <algorithm>

#include "blas.h"
#include "blocks.h"
#include "reflector.h"
#include "tridiagonal.h"

namespace alds {
namespace {

constexpr int64_t BAND = 32;
constexpr int64_t WORK = 64 * BAND;  // values that LAPACK may work in
template <typename T>
constexpr int64_t PARTS = BAND / lanes<T>;
template <typename T>
constexpr int64_t COLUMN = 2 * BAND + lanes<T>;  // of the band's storage: band, bulge, what is written above a diagonal
template <typename T>
constexpr int64_t STRIDE = COLUMN<T> - 1;  // from entry (i, j), at i + j STRIDE, to (i, j + 1)

ALDS_INLINE Vectors<double>::Loose& loose(double* x) { return *reinterpret_cast<Vectors<double>::Loose*>(x); }
ALDS_INLINE Vectors<float>::Loose& loose(float* x) { return *reinterpret_cast<Vectors<float>::Loose*>(x); }

// The lower triangle of a symmetric matrix, stored as blocks.h says, to entries at most BAND below the diagonal.
template <typename T>
void to_band(T* a, int64_t n, BufferOf<T>& scratch) {
  const int64_t end = whole_blocks<T>(n), lead = padded<T>(n);
  T* v = grow(scratch, 2 * lead * BAND + 2 * BAND * BAND + BAND + WORK);
  T *w = v + lead * BAND, *t = w + lead * BAND, *s = t + BAND * BAND, *tau = s + BAND * BAND, *work = tau + BAND;
  std::fill(v, t, 0.0);
  for (int64_t first = 0; first + BAND + 1 < n; first += BAND) {
    const int64_t begin = first + BAND;
    const int64_t m = n - begin, k = std::min(BAND, m);
    T* panel = a + first * lead + begin;
    geqrf(m, BAND, panel, lead, tau, work, WORK);
    for (int64_t c = 0; c < k; ++c) {
      T* column = v + c * lead + begin;
      std::fill(column, column + c, 0.0);
      column[c] = 1.0;
      std::copy(panel + c * lead + c + 1, panel + c * lead + m, column + c + 1);
    }
    larft('F', 'C', m, k, v + begin, lead, tau, t, BAND);
    // (I - V T' V') A (I - V T V') = A - V W' - W V' with W = X - V T' V' X / 2, X = A V T
    symm<T>('L', 'L', m, k, 1, a + begin * lead + begin, lead, v + begin, lead, 0, w + begin, lead);
    trmm<T>('R', 'U', 'N', 'N', m, k, 1, t, BAND, w + begin, lead);
    gemm<T>('T', 'N', k, k, m, 1, v + begin, lead, w + begin, lead, 0, s, BAND);
    trmm<T>('L', 'U', 'T', 'N', k, k, 1, t, BAND, s, BAND);
    gemm<T>('N', 'N', m, k, k, -0.5, v + begin, lead, s, BAND, 1, w + begin, lead);
    rank_two_update(begin, end, k, a, v, w, lead);
  }
}

// D := H D H, H = I - tau v v', D BAND x BAND and symmetric, lower triangle.
template <typename T>
ALDS_INLINE void both_sides(T* d, const T* v, T tau) {
  const auto lane = numbered<T>();
  alignas(64) T w[BAND];
  Line<T> y[PARTS<T>] = {}, inner = Line<T>{};
#pragma GCC unroll 4
  for (int64_t g = 0; g < PARTS<T>; ++g) {
    Line<T> sum[lanes<T>];
#pragma GCC unroll 16
    for (int64_t c = 0; c < lanes<T>; ++c) {
      T* column = d + (g * lanes<T> + c) * STRIDE<T>;
      const Line<T> corner = loose(column + g * lanes<T>);
      const T x = v[g * lanes<T> + c];
      y[g] += (lane >= int(c) ? corner : Line<T>{}) * x;
      sum[c] = (lane > int(c) ? corner : Line<T>{}) * at(v + g * lanes<T>);
#pragma GCC unroll 4
      for (int64_t h = g + 1; h < PARTS<T>; ++h) {
        const Line<T> m = loose(column + h * lanes<T>);
        y[h] += m * x;
        sum[c] += m * at(v + h * lanes<T>);
      }
    }
    y[g] += line_sums<T>(sum);
  }
  for (int64_t g = 0; g < PARTS<T>; ++g) inner += y[g] * at(v + g * lanes<T>);
  T product = 0.0;
  for (int64_t k = 0; k < lanes<T>; ++k) product += inner[k];
  const T half = -0.5 * tau * tau * product;
  for (int64_t g = 0; g < PARTS<T>; ++g) at(w + g * lanes<T>) = tau * y[g] + half * at(v + g * lanes<T>);
#pragma GCC unroll 4
  for (int64_t g = 0; g < PARTS<T>; ++g)
    for (int64_t c = g * lanes<T>; c < (g + 1) * lanes<T>; ++c)
#pragma GCC unroll 4
      for (int64_t h = g; h < PARTS<T>; ++h)
        loose(d + c * STRIDE<T> + h * lanes<T>) -= at(v + h * lanes<T>) * w[c] + at(w + h * lanes<T>) * v[c];
}

// E := H' E H, BAND x BAND, where H = I - tau v v' and H' = I - tau' v' v'^T clears its first column but for an entry.
template <typename T>
ALDS_INLINE T chase_full(T* e, const T* v, T tau, T* next) {
  Line<T> y[PARTS<T>] = {};
  for (int64_t c = 0; c < BAND; ++c)
#pragma GCC unroll 4
    for (int64_t h = 0; h < PARTS<T>; ++h) y[h] += loose(e + c * STRIDE<T> + h * lanes<T>) * v[c];
  for (int64_t h = 0; h < PARTS<T>; ++h) {
    y[h] *= tau;
    at(next + h * lanes<T>) = loose(e + h * lanes<T>) - y[h] * v[0];
  }
  T beta;
  const T next_tau = reflector(BAND, next, beta);
  for (int64_t g = 0; g < PARTS<T>; ++g) {
    Line<T> sum[lanes<T>] = {};
#pragma GCC unroll 16
    for (int64_t c = 0; c < lanes<T>; ++c)
#pragma GCC unroll 4
      for (int64_t h = 0; h < PARTS<T>; ++h) {
        typename Vectors<T>::Loose& entry = loose(e + (g * lanes<T> + c) * STRIDE<T> + h * lanes<T>);
        const Line<T> value = entry - y[h] * v[g * lanes<T> + c];
        entry = value;
        sum[c] += value * at(next + h * lanes<T>);
      }
    const Line<T> dot = next_tau * line_sums<T>(sum);
#pragma GCC unroll 16
    for (int64_t c = 0; c < lanes<T>; ++c)
#pragma GCC unroll 4
      for (int64_t h = 0; h < PARTS<T>; ++h)
        loose(e + (g * lanes<T> + c) * STRIDE<T> + h * lanes<T>) -= dot[c] * at(next + h * lanes<T>);
  }
  e[0] = beta;
  std::fill(e + 1, e + BAND, 0.0);
  return next_tau;
}

// The same where the matrix ends: D has `size` rows.
template <typename T>
void both_sides_at_end(T* d, int64_t size, const T* v, T tau) {
  T w[BAND] = {}, product = 0.0;
  for (int64_t c = 0; c < size; ++c)
    for (int64_t i = c; i < size; ++i) {
      w[i] += d[c * STRIDE<T> + i] * v[c];
      if (i > c) w[c] += d[c * STRIDE<T> + i] * v[i];
    }
  for (int64_t i = 0; i < size; ++i) product += w[i] * v[i];
  for (int64_t i = 0; i < size; ++i) w[i] = tau * w[i] - 0.5 * tau * tau * product * v[i];
  for (int64_t c = 0; c < size; ++c)
    for (int64_t i = c; i < size; ++i) d[c * STRIDE<T> + i] -= v[i] * w[c] + w[i] * v[c];
}

// The same where the matrix ends: E has `size` rows.
template <typename T>
T chase_at_end(T* e, int64_t size, const T* v, T tau, T* next) {
  T y[BAND] = {}, beta;
  for (int64_t c = 0; c < BAND; ++c)
    for (int64_t i = 0; i < size; ++i) y[i] += tau * e[c * STRIDE<T> + i] * v[c];
  for (int64_t c = 0; c < BAND; ++c)
    for (int64_t i = 0; i < size; ++i) e[c * STRIDE<T> + i] -= y[i] * v[c];
  std::copy(e, e + size, next);
  const T next_tau = reflector(size, next, beta);
  for (int64_t c = 0; c < BAND; ++c) {
    T dot = 0.0;
    for (int64_t i = 0; i < size; ++i) dot += next[i] * e[c * STRIDE<T> + i];
    for (int64_t i = 0; i < size; ++i) e[c * STRIDE<T> + i] -= next_tau * dot * next[i];
  }
  e[0] = beta;
  std::fill(e + 1, e + size, 0.0);
  return next_tau;
}

// Clear a column of the band below its off-diagonal, and the bulges that this makes, all the way down.
template <typename T>
ALDS_INLINE void clear_column_of(T* band, int64_t n, int64_t column) {
  alignas(64) T first[BAND], second[BAND];
  T *v = first, *next = second, *below = band + column * STRIDE<T> + column + 1;
  int64_t begin = column + 1, size = std::min<int64_t>(BAND, n - begin);
  std::copy(below, below + size, v);
  T tau = reflector(size, v, below[0]);
  std::fill(below + 1, below + size, 0.0);
  while (true) {
    T* diagonal = band + begin * STRIDE<T> + begin;
    if (size < BAND) return both_sides_at_end(diagonal, size, v, tau);
    both_sides(diagonal, v, tau);
    size = std::min<int64_t>(BAND, n - begin - BAND);
    if (size <= 0) return;
    tau = size == BAND ? chase_full(diagonal + BAND, v, tau, next) : chase_at_end(diagonal + BAND, size, v, tau, next);
    std::swap(v, next);
    begin += BAND;
  }
}

// (Clones of a template are more than the compiler knows how to make.)
ALDS_CLONES void clear_column(double* band, int64_t n, int64_t column) { clear_column_of(band, n, column); }
ALDS_CLONES void clear_column(float* band, int64_t n, int64_t column) { clear_column_of(band, n, column); }

}  // namespace

template <typename T>
void tridiagonalise_large(T* a, int64_t n, T* diagonal, T* off_diagonal, BufferOf<T>& scratch) {
  to_band(a, n, scratch);
  const int64_t lead = padded<T>(n);
  T* band = grow(scratch, n * COLUMN<T>);
  std::fill(band, band + n * COLUMN<T>, 0.0);
  for (int64_t j = 0; j < n; ++j)
    std::copy(a + j * lead + j, a + j * lead + std::min(n, j + BAND + 1), band + j * STRIDE<T> + j);
  for (int64_t j = 0; j + 2 < n; ++j) clear_column(band, n, j);
  for (int64_t j = 0; j < n; ++j) diagonal[j] = band[j * STRIDE<T> + j];
  for (int64_t j = 0; j + 1 < n; ++j) off_diagonal[j] = band[j * STRIDE<T> + j + 1];
}

template void tridiagonalise_large(double*, int64_t, double*, double*, BufferOf<double>&);
template void tridiagonalise_large(float*, int64_t, float*, float*, BufferOf<float>&);

}  // namespace alds
