// Batched randomized SVD with a certificate, on the smaller Gram matrix of each slice.
//
// Q spans the sketch; T = Q^T G Q. The sum of T's `rank` largest eigenvalues is the energy that the truncated factors
// capture, so ||W||_F^2 minus it is their exact squared error (Halko, Martinsson, Tropp 2011, sections 4.3 and 5).
// Power iterations go on until that is within (1 + tolerance) of the optimum known from the spectrum.
//
// The basis of a float32 slice is computed in float32 where its error is well above what such arithmetic loses. Its
// projection and the certificate are float64 all the same. Where the certificate fails, the basis is computed in
// float64.
#include "rsvd.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <vector>

#include "blas.h"
#include "blocks.h"
#include "factors.h"
#include "gram.h"
#include "norms.h"
#include "parallel.h"
#include "tridiagonal.h"

namespace alds {
namespace {

constexpr double FLOAT_EPSILONS = 8.0;  // of ||W||^2 that the tolerance must come to for float32 to be tried (measured)

template <typename T>
struct Workspace {
  BufferOf<T> gram, basis, image, small, values, work, scratch, factor;
  std::vector<int> integers;

  int* integer(size_t size) {
    if (integers.size() < size) integers.resize(size);
    return integers.data();
  }
};

// Counter-based standard normals: a hash of (seed, slice, index). The sketch is the same for any number of threads.
uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

double uniform(uint64_t bits) { return (static_cast<double>(bits >> 11) + 0.5) * 0x1.0p-53; }

template <typename T>
void gaussian(uint64_t seed, uint64_t slice, T* out, int64_t count) {
  const uint64_t key = mix(seed ^ mix(slice));
  for (int64_t i = 0; i < count; i += 2) {
    const double radius = std::sqrt(-2.0 * std::log(uniform(mix(key + i))));
    const double angle = 6.283185307179586 * uniform(mix(key + i + 1));
    out[i] = static_cast<T>(radius * std::cos(angle));
    if (i + 1 < count) out[i + 1] = static_cast<T>(radius * std::sin(angle));
  }
}

template <typename T>
void product(char op_a, char op_b, int m, int n, int k, const T* a, int lda, const T* b, int ldb, T* c, int ldc) {
  gemm<T>(op_a, op_b, m, n, k, 1, a, lda, b, ldb, 0, c, ldc);
}

// Orthonormal basis of the columns of a (rows x cols, column-major), in place.
template <typename T>
void orthonormalise(T* a, int rows, int cols, Workspace<T>& w) {
  const int lwork = 64 * cols;
  T* tau = grow(w.work, cols + lwork);
  geqrf(rows, cols, a, rows, tau, tau + cols, lwork);
  orgqr(rows, cols, cols, a, rows, tau, tau + cols, lwork);
}

// Eigenvalues ascending into w.values; a (order x order, lower triangle) becomes the eigenvectors.
template <typename T>
void eigen(T* a, int order, Workspace<T>& w) {
  const int lwork = 1 + 6 * order + 2 * order * order, liwork = 3 + 5 * order;
  T *values = grow(w.values, order), *work = grow(w.work, lwork);
  syevd('V', 'L', order, a, order, values, work, lwork, w.integer(liwork), liwork);
}

template <typename T>
double top(const BufferOf<T>& ascending, int64_t order, int64_t rank) {
  double sum = 0.0;
  for (int64_t i = std::max<int64_t>(0, order - rank); i < order; ++i) sum += ascending[i];
  return sum;
}

template <typename T>
void mirror(T* a, int64_t order, int64_t ld) {  // fill the upper triangle from the lower one
  for (int64_t j = 0; j < order; ++j)
    for (int64_t i = j + 1; i < order; ++i) a[i * ld + j] = a[j * ld + i];
}

struct Target {
  double total, optimum, tolerance;

  bool met(double error, int64_t order) const {
    return error <= (1.0 + tolerance) * optimum + order * std::numeric_limits<double>::epsilon() * total;
  }
  bool float_may_do() const {
    return tolerance * optimum >= FLOAT_EPSILONS * std::numeric_limits<float>::epsilon() * total;
  }
};

// Top `rank` eigenvectors of the Gram matrix (destroyed, entries at most 1) into w.factor (order x rank). The
// tridiagonal problem is solved whole, by divide and conquer. Only the vectors that are kept are transformed back.
template <typename T>
void exact(T* gram, Workspace<T>& w, int64_t order, int64_t rank) {
  T* factor = grow(w.factor, order * rank);
  const int64_t ld = padded<T>(order);
  complete_blocks(gram, order);
  T *values = grow(w.values, 3 * order), *off_diagonal = values + order, *tau = off_diagonal + order;
  tridiagonalise(gram, order, values, off_diagonal, tau, w.scratch);
  int lwork = 1 + 4 * order + order * order;
  const int liwork = 3 + 5 * order;
  T *z = grow(w.basis, order * order), *work = grow(w.work, lwork);
  stedc('I', order, values, off_diagonal, z, order, work, lwork, w.integer(liwork), liwork);
  for (int64_t j = 0; j < rank; ++j)  // eigenvalues ascend
    std::copy(z + (order - 1 - j) * order, z + (order - j) * order, factor + j * order);
  if (order == 1) return;
  lwork = std::max<int64_t>(64 * rank, 64 * 65);
  ormqr('L', 'N', order - 1, rank, order - 1, gram + 1, ld, tau, factor + 1, order, grow(w.work, lwork), lwork);
}

// Randomized subspace iteration into w.factor, on the Gram matrix over `target.total`. False: no certificate was
// reached.
template <typename T>
bool sketched(T* gram, Workspace<T>& w, int64_t order, int64_t rank, int64_t width, const Target& target,
              const RsvdOptions& o, uint64_t slice, int64_t& iterations) {
  T *basis = grow(w.basis, order * width), *image = grow(w.image, order * width), *small = grow(w.small, width * width);
  gaussian(o.seed, slice, image, order * width);
  product('N', 'N', order, width, order, gram, padded<T>(order), image, order, basis, order);
  for (iterations = 1; iterations <= o.max_iterations; ++iterations) {
    orthonormalise(basis, order, width, w);
    product('N', 'N', order, width, order, gram, padded<T>(order), basis, order, image, order);
    product('T', 'N', width, width, order, basis, order, image, order, small, width);
    eigen(small, width, w);
    if (target.met(target.total * std::max(0.0, 1.0 - top(w.values, width, rank)), order)) {
      T* factor = grow(w.factor, order * rank);
      product('N', 'N', order, rank, width, basis, order, small + (width - rank) * width, width, factor, order);
      return true;
    }
    std::swap(w.basis, w.image);
    basis = w.basis.data();
    image = w.image.data();
  }
  return false;
}

// Orthonormal basis of a slice that is not zero, computed in T, into w.factor; returns the iterations, as Factors has
// them.
template <typename T>
int64_t basis_of(const Slice& slice, int64_t rank, const Target& target, const RsvdOptions& o, uint64_t index,
                 Workspace<T>& w) {
  const int64_t order = slice.order(), width = std::min(order, rank + o.oversample), ld = padded<T>(order);
  T* g = grow(w.gram, blocks_size<T>(order));
  gram(slice, 1.0 / std::sqrt(target.total), g, w.scratch);  // so that no square over- or underflows
  int64_t iterations = EXACT_BY_CHOICE;
  if (width <= o.exact_fraction * order) {
    mirror(g, order, ld);
    if (sketched(g, w, order, rank, width, target, o, index, iterations)) return iterations;
    iterations = EXACT_BY_FALLBACK;
  }
  exact(g, w, order, rank);
  return iterations;
}

struct Workspaces {
  Workspace<float> single;
  Workspace<double> full;
};

void factor_slice(const RsvdProblem& p, int64_t index, const RsvdOptions& o, Workspaces& w) {
  const MatrixBatch& m = p.matrix;
  const Slice slice = slice_of(m, p.groups, index / p.groups, index % p.groups);
  const int64_t order = slice.order(), left = index * m.rows * p.rank, right = index * p.rank * slice.width;
  const double total = p.norm[index] = squared_norm(slice), norm = total > 0.0 ? std::sqrt(total) : 1.0;
  if (!std::isfinite(total)) throw std::runtime_error(NOT_FINITE);
  const Target target{total, p.optimum[index], o.tolerance};
  auto write = [&] {
    const double captured =
        m.is_double ? write_factors(slice, p.rank, norm, w.full.factor.data(), w.full.scratch,
                                    static_cast<double*>(p.left) + left, static_cast<double*>(p.right) + right)
                    : write_factors(slice, p.rank, norm, w.full.factor.data(), w.full.scratch,
                                    static_cast<float*>(p.left) + left, static_cast<float*>(p.right) + right);
    p.error[index] = std::max(0.0, total - captured);
    return std::isfinite(captured) && target.met(p.error[index], order);
  };
  if (total == 0.0) {
    double* factor = grow(w.full.factor, order * p.rank);
    std::fill(factor, factor + order * p.rank, 0.0);
    for (int64_t j = 0; j < p.rank; ++j) factor[j * order + j] = 1.0;
    p.iterations[index] = EXACT_BY_CHOICE;
    write();
    return;
  }
  const bool sketches = o.exact_fraction > 0.0;  // else the errors are asked for to the last digit
  if (sketches && !m.is_double && target.float_may_do()) {
    p.iterations[index] = basis_of(slice, p.rank, target, o, index, w.single);
    widen(w.single.factor.data(), order, p.rank, grow(w.full.factor, order * p.rank));
    if (write()) return;
  }
  p.iterations[index] = basis_of(slice, p.rank, target, o, index, w.full);
  write();
}

}  // namespace

void batched_rsvd(const std::vector<RsvdProblem>& problems, const RsvdOptions& options, int threads) {
  struct Task {
    int64_t problem, slice;
    double cost;
  };
  std::vector<Task> tasks;
  for (size_t p = 0; p < problems.size(); ++p) {
    const MatrixBatch& m = problems[p].matrix;
    const double order = std::min(m.rows, m.cols / problems[p].groups);
    const double cost = order * (double(m.rows) * m.cols / problems[p].groups + order * order);
    for (int64_t s = 0; s < m.batch * problems[p].groups; ++s) tasks.push_back({int64_t(p), s, cost});
  }
  parallel_tasks<Workspaces>(tasks, threads, [&](const Task& t, Workspaces& workspaces) {
    factor_slice(problems[t.problem], t.slice, options, workspaces);
  });
}

}  // namespace alds
