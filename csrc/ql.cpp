// Eigenvalues of several tridiagonal matrices at once: the root-free QL iteration of Pal, Walker and Kahan (Reinsch,
// "A stable, rational QL algorithm", 1973; LAPACK's dsterf), one matrix per vector lane. A single matrix is a chain of
// divisions that leaves a core waiting; eight of them side by side cost about as much as one.
//
// All lanes sweep from the last row up to their own first unconverged row. A coupling of zero inside restarts the
// recurrence by itself, so blocks need not be searched for.
#include "ql.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "vector.h"

namespace alds {
namespace {

// One QL sweep with shift sigma; lane k stops after its row first[k]. Returns gamma and p of every lane's last row.
ALDS_CLONES void sweep(int64_t n, int64_t lowest, const Integers& first, const Vector& sigma, Vector* __restrict d,
                       Vector* __restrict e2, Vector* last_gamma, Vector* last_coupling) {
  const Vector one = Vector{} + 1.0, tiny = Vector{} + 1e-290;
  Vector c = one, s = Vector{}, gamma = d[n - 1] - sigma, p = gamma * gamma;
  for (int64_t i = n - 2; i >= lowest; --i) {
    const Integers active = first <= i;
    const Vector bb = e2[i], r = p + bb;
    e2[i + 1] = active ? s * r : e2[i + 1];
    const Integers regular = r > tiny;
    const Vector inverse = one / (regular ? r : one);
    const Vector c_new = regular ? p * inverse : one, s_new = regular ? bb * inverse : Vector{};
    const Vector alpha = d[i], gamma_new = c_new * (alpha - sigma) - s_new * gamma;
    d[i + 1] = active ? gamma + (alpha - gamma_new) : d[i + 1];
    const Integers turned = c_new > tiny;
    const Vector p_new = turned ? gamma_new * gamma_new / (turned ? c_new : one) : c * bb;
    c = active ? c_new : c;
    s = active ? s_new : s;
    gamma = active ? gamma_new : gamma;
    p = active ? p_new : p;
  }
  *last_gamma = gamma;
  *last_coupling = s * p;
}

// Wilkinson's shift from the first two rows.
double shift(double d0, double d1, double e2) {
  const double e = std::sqrt(e2), half = (d1 - d0) / (2.0 * e);
  return d0 - e / (half + std::copysign(std::hypot(half, 1.0), half));
}

}  // namespace

void tridiagonal_eigenvalues(int64_t n, int64_t count, double* const* diagonal, const double* const* off_diagonal,
                             Buffer& scratch) {
  if (n == 1) return;
  auto* d = reinterpret_cast<Vector*>(grow(scratch, 2 * n * LANES));
  Vector* e2 = d + n;
  double limit[LANES];
  Integers first;
  for (int64_t k = 0; k < LANES; ++k) {
    double norm = 0.0;
    for (int64_t i = 0; i < n; ++i) {
      const double value = k < count ? diagonal[k][i] : 0.0,
                   coupling = k < count && i < n - 1 ? off_diagonal[k][i] : 0.0;
      d[i][k] = value;
      e2[i][k] = coupling * coupling;
      norm = std::max(norm, std::abs(value) + 2.0 * std::abs(coupling));
    }
    limit[k] = std::pow(0.5 * std::numeric_limits<double>::epsilon() * norm, 2);
    first[k] = k < count ? 0 : n;
  }
  for (int64_t round = 0;; ++round) {
    int64_t lowest = n;
    Vector sigma = Vector{};
    for (int64_t k = 0; k < count; ++k) {
      while (first[k] < n - 1 && !(e2[first[k]][k] > limit[k])) first[k] += 1;
      if (first[k] >= n - 1) {
        first[k] = n;
        continue;
      }
      sigma[k] = shift(d[first[k]][k], d[first[k] + 1][k], e2[first[k]][k]);
      lowest = std::min<int64_t>(lowest, first[k]);
    }
    if (lowest == n) break;
    if (round > 30 * n) throw std::runtime_error("the QL iteration did not converge");
    Vector gamma, coupling;
    sweep(n, lowest, first, sigma, d, e2, &gamma, &coupling);
    for (int64_t k = 0; k < count; ++k) {
      if (first[k] >= n) continue;
      d[first[k]][k] = sigma[k] + gamma[k];
      e2[first[k]][k] = coupling[k];
    }
  }
  for (int64_t k = 0; k < count; ++k)
    for (int64_t i = 0; i < n; ++i) diagonal[k][i] = d[i][k];
}

}  // namespace alds
