// Tridiagonal form of a large symmetric matrix in two stages, without the reflectors (Bischof, Lang, Sun, "A framework for
// symmetric band reduction", 2000): to a band by block reflectors, whose products read the matrix once for BAND columns
// and not once for each; then from band to tridiagonal by chasing bulges down it, in the cache.
#include <algorithm>

#include "core.h"
#include "reflector.h"

namespace alds {
namespace {

constexpr int64_t BAND = 32;
constexpr int64_t PARTS = BAND / LANES;
constexpr int64_t COLUMN = 2 * BAND + LANES;  // of the band's storage: band, bulge, and what may be written above a diagonal
constexpr int64_t STRIDE = COLUMN - 1;        // from entry (i, j), at i + j STRIDE, to (i, j + 1)

typedef double Loose __attribute__((vector_size(64), aligned(8)));
ALDS_INLINE Loose& loose(double* x) { return *reinterpret_cast<Loose*>(x); }

// The lower triangle of a symmetric matrix, stored as for tridiagonalise, to entries at most BAND below the diagonal.
void to_band(double* a, int64_t n, Buffer& scratch) {
  const Lapack<double>& l = lapack<double>();
  const int64_t end = whole_blocks<double>(n), lead = padded<double>(n);
  double* v = grow(scratch, 2 * lead * BAND + 2 * BAND * BAND + BAND + 64 * BAND);
  double *w = v + lead * BAND, *t = w + lead * BAND, *s = t + BAND * BAND, *tau = s + BAND * BAND, *work = tau + BAND;
  std::fill(v, t, 0.0);
  char left = 'L', right = 'R', lower = 'L', upper = 'U', no = 'N', transposed = 'T', forward = 'F', columns = 'C';
  double zero = 0.0, one = 1.0, minus_half = -0.5;
  int ld = lead, band = BAND, lwork = 64 * BAND, info = 0;
  for (int64_t first = 0; first + BAND + 1 < n; first += BAND) {
    const int64_t begin = first + BAND;
    int m = n - begin, k = std::min<int64_t>(BAND, m);
    double* panel = a + first * lead + begin;
    l.geqrf(&m, &band, panel, &ld, tau, work, &lwork, &info);
    check(info, "geqrf");
    for (int64_t c = 0; c < k; ++c) {
      double* column = v + c * lead + begin;
      std::fill(column, column + c, 0.0);
      column[c] = 1.0;
      std::copy(panel + c * lead + c + 1, panel + c * lead + m, column + c + 1);
    }
    l.larft(&forward, &columns, &m, &k, v + begin, &ld, tau, t, &band);
    // (I - V T' V') A (I - V T V') = A - V W' - W V' with W = X - V T' V' X / 2, X = A V T
    l.symm(&left, &lower, &m, &k, &one, a + begin * lead + begin, &ld, v + begin, &ld, &zero, w + begin, &ld);
    l.trmm(&right, &upper, &no, &no, &m, &k, &one, t, &band, w + begin, &ld);
    l.gemm(&transposed, &no, &k, &k, &m, &one, v + begin, &ld, w + begin, &ld, &zero, s, &band);
    l.trmm(&left, &upper, &transposed, &no, &k, &k, &one, t, &band, s, &band);
    l.gemm(&no, &no, &m, &k, &k, &minus_half, v + begin, &ld, s, &band, &one, w + begin, &ld);
    rank_two_update(begin, end, k, a, v, w, lead);
  }
}

// D := H D H, H = I - tau v v', D BAND x BAND and symmetric, lower triangle.
ALDS_INLINE void both_sides(double* d, const double* v, double tau) {
  const Integers lane = {0, 1, 2, 3, 4, 5, 6, 7};
  alignas(64) double w[BAND];
  Vector y[PARTS] = {}, inner = Vector{};
#pragma GCC unroll 4
  for (int64_t g = 0; g < PARTS; ++g) {
    Vector sum[LANES];
#pragma GCC unroll 8
    for (int64_t c = 0; c < LANES; ++c) {
      double* column = d + (g * LANES + c) * STRIDE;
      const Vector corner = loose(column + g * LANES);
      const double x = v[g * LANES + c];
      y[g] += (lane >= c ? corner : Vector{}) * x;
      sum[c] = (lane > c ? corner : Vector{}) * at(v + g * LANES);
#pragma GCC unroll 4
      for (int64_t h = g + 1; h < PARTS; ++h) {
        const Vector m = loose(column + h * LANES);
        y[h] += m * x;
        sum[c] += m * at(v + h * LANES);
      }
    }
    y[g] += sums<double>(sum);
  }
  for (int64_t g = 0; g < PARTS; ++g) inner += y[g] * at(v + g * LANES);
  double product = 0.0;
  for (int64_t k = 0; k < LANES; ++k) product += inner[k];
  const double half = -0.5 * tau * tau * product;
  for (int64_t g = 0; g < PARTS; ++g) at(w + g * LANES) = tau * y[g] + half * at(v + g * LANES);
#pragma GCC unroll 4
  for (int64_t g = 0; g < PARTS; ++g)
    for (int64_t c = g * LANES; c < (g + 1) * LANES; ++c)
#pragma GCC unroll 4
      for (int64_t h = g; h < PARTS; ++h)
        loose(d + c * STRIDE + h * LANES) -= at(v + h * LANES) * w[c] + at(w + h * LANES) * v[c];
}

// E := H' E H, BAND x BAND, where H = I - tau v v' and H' = I - tau' v' v'^T clears its first column but for an entry.
ALDS_INLINE double chase_full(double* e, const double* v, double tau, double* next) {
  Vector y[PARTS] = {};
  for (int64_t c = 0; c < BAND; ++c)
#pragma GCC unroll 4
    for (int64_t h = 0; h < PARTS; ++h) y[h] += loose(e + c * STRIDE + h * LANES) * v[c];
  for (int64_t h = 0; h < PARTS; ++h) {
    y[h] *= tau;
    at(next + h * LANES) = loose(e + h * LANES) - y[h] * v[0];
  }
  double beta;
  const double next_tau = reflector(BAND, next, beta);
  for (int64_t g = 0; g < PARTS; ++g) {
    Vector sum[LANES] = {};
#pragma GCC unroll 8
    for (int64_t c = 0; c < LANES; ++c)
#pragma GCC unroll 4
      for (int64_t h = 0; h < PARTS; ++h) {
        Loose& entry = loose(e + (g * LANES + c) * STRIDE + h * LANES);
        const Vector value = entry - y[h] * v[g * LANES + c];
        entry = value;
        sum[c] += value * at(next + h * LANES);
      }
    const Vector dot = next_tau * sums<double>(sum);
#pragma GCC unroll 8
    for (int64_t c = 0; c < LANES; ++c)
#pragma GCC unroll 4
      for (int64_t h = 0; h < PARTS; ++h)
        loose(e + (g * LANES + c) * STRIDE + h * LANES) -= dot[c] * at(next + h * LANES);
  }
  e[0] = beta;
  std::fill(e + 1, e + BAND, 0.0);
  return next_tau;
}

// The same where the matrix ends: D has `size` rows.
void both_sides_at_end(double* d, int64_t size, const double* v, double tau) {
  double w[BAND] = {}, product = 0.0;
  for (int64_t c = 0; c < size; ++c)
    for (int64_t i = c; i < size; ++i) {
      w[i] += d[c * STRIDE + i] * v[c];
      if (i > c) w[c] += d[c * STRIDE + i] * v[i];
    }
  for (int64_t i = 0; i < size; ++i) product += w[i] * v[i];
  for (int64_t i = 0; i < size; ++i) w[i] = tau * w[i] - 0.5 * tau * tau * product * v[i];
  for (int64_t c = 0; c < size; ++c)
    for (int64_t i = c; i < size; ++i) d[c * STRIDE + i] -= v[i] * w[c] + w[i] * v[c];
}

// The same where the matrix ends: E has `size` rows.
double chase_at_end(double* e, int64_t size, const double* v, double tau, double* next) {
  double y[BAND] = {}, beta;
  for (int64_t c = 0; c < BAND; ++c)
    for (int64_t i = 0; i < size; ++i) y[i] += tau * e[c * STRIDE + i] * v[c];
  for (int64_t c = 0; c < BAND; ++c)
    for (int64_t i = 0; i < size; ++i) e[c * STRIDE + i] -= y[i] * v[c];
  std::copy(e, e + size, next);
  const double next_tau = reflector(size, next, beta);
  for (int64_t c = 0; c < BAND; ++c) {
    double dot = 0.0;
    for (int64_t i = 0; i < size; ++i) dot += next[i] * e[c * STRIDE + i];
    for (int64_t i = 0; i < size; ++i) e[c * STRIDE + i] -= next_tau * dot * next[i];
  }
  e[0] = beta;
  std::fill(e + 1, e + size, 0.0);
  return next_tau;
}

// Clear a column of the band below its off-diagonal, and the bulges that this makes, all the way down.
ALDS_CLONES void clear_column(double* band, int64_t n, int64_t column) {
  alignas(64) double first[BAND], second[BAND];
  double *v = first, *next = second, *below = band + column * STRIDE + column + 1;
  int64_t begin = column + 1, size = std::min<int64_t>(BAND, n - begin);
  std::copy(below, below + size, v);
  double tau = reflector(size, v, below[0]);
  std::fill(below + 1, below + size, 0.0);
  while (true) {
    double* diagonal = band + begin * STRIDE + begin;
    if (size < BAND) return both_sides_at_end(diagonal, size, v, tau);
    both_sides(diagonal, v, tau);
    size = std::min<int64_t>(BAND, n - begin - BAND);
    if (size <= 0) return;
    tau = size == BAND ? chase_full(diagonal + BAND, v, tau, next) : chase_at_end(diagonal + BAND, size, v, tau, next);
    std::swap(v, next);
    begin += BAND;
  }
}

}  // namespace

void tridiagonalise_large(double* a, int64_t n, double* diagonal, double* off_diagonal, Buffer& scratch) {
  to_band(a, n, scratch);
  const int64_t lead = padded<double>(n);
  double* band = grow(scratch, n * COLUMN);
  std::fill(band, band + n * COLUMN, 0.0);
  for (int64_t j = 0; j < n; ++j)
    std::copy(a + j * lead + j, a + j * lead + std::min(n, j + BAND + 1), band + j * STRIDE + j);
  for (int64_t j = 0; j + 2 < n; ++j) clear_column(band, n, j);
  for (int64_t j = 0; j < n; ++j) diagonal[j] = band[j * STRIDE + j];
  for (int64_t j = 0; j + 1 < n; ++j) off_diagonal[j] = band[j * STRIDE + j + 1];
}

}  // namespace alds
