// Batched randomized SVD with a certificate, on the smaller Gram matrix of each slice.
//
// Q spans the sketch; T = Q^T G Q. The sum of T's `rank` largest eigenvalues is the energy that the truncated factors
// capture, so ||W||_F^2 minus it is their exact squared error (Halko, Martinsson, Tropp 2011, sections 4.3 and 5).
// Power iterations go on until that is within (1 + tolerance) of the optimum known from the spectrum.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "core.h"

namespace alds {
namespace {

constexpr int64_t CHUNK = 1 << 17;  // doubles of W converted at a time: 1 MiB

struct Workspace {
  Buffer gram, basis, image, small, values, work, scratch, factor;
  std::vector<int> integers;
};

// Counter-based standard normals: a hash of (seed, slice, index), so the sketch is the same for any number of threads.
uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

double uniform(uint64_t bits) { return (static_cast<double>(bits >> 11) + 0.5) * 0x1.0p-53; }

void gaussian(uint64_t seed, uint64_t slice, double* out, int64_t count) {
  const uint64_t key = mix(seed ^ mix(slice));
  for (int64_t i = 0; i < count; i += 2) {
    const double radius = std::sqrt(-2.0 * std::log(uniform(mix(key + i))));
    const double angle = 6.283185307179586 * uniform(mix(key + i + 1));
    out[i] = radius * std::cos(angle);
    if (i + 1 < count) out[i + 1] = radius * std::sin(angle);
  }
}

void product(char ta, char tb, int m, int n, int k, double* a, int lda, double* b, int ldb, double* c, int ldc) {
  double one = 1.0, zero = 0.0;
  lapack().dgemm(&ta, &tb, &m, &n, &k, &one, a, &lda, b, &ldb, &zero, c, &ldc);
}

void check(int info, const char* routine) {
  if (info != 0) throw std::runtime_error(std::string(routine) + " failed with info = " + std::to_string(info));
}

// Orthonormal basis of the columns of a (rows x cols, column-major), in place.
void orthonormalise(double* a, int rows, int cols, Workspace& w) {
  int lwork = 64 * cols, info = 0;
  double* tau = grow(w.work, cols + lwork);
  lapack().dgeqrf(&rows, &cols, a, &rows, tau, tau + cols, &lwork, &info);
  check(info, "dgeqrf");
  lapack().dorgqr(&rows, &cols, &cols, a, &rows, tau, tau + cols, &lwork, &info);
  check(info, "dorgqr");
}

// Eigenvalues ascending into w.values; a (order x order, lower triangle) becomes the eigenvectors.
void eigen(double* a, int order, Workspace& w) {
  char job = 'V', lower = 'L';
  int lwork = 1 + 6 * order + 2 * order * order, liwork = 3 + 5 * order, info = 0;
  double* work = grow(w.work, lwork);
  if (static_cast<int>(w.integers.size()) < liwork) w.integers.resize(liwork);
  lapack().dsyevd(&job, &lower, &order, a, &order, grow(w.values, order), work, &lwork, w.integers.data(), &liwork,
                  &info);
  check(info, "dsyevd");
}

double top(const Buffer& ascending, int64_t order, int64_t rank) {
  double sum = 0.0;
  for (int64_t i = std::max<int64_t>(0, order - rank); i < order; ++i) sum += ascending[i];
  return sum;
}

void mirror(double* a, int64_t order, int64_t ld) {  // fill the upper triangle from the lower one
  for (int64_t j = 0; j < order; ++j)
    for (int64_t i = j + 1; i < order; ++i) a[i * ld + j] = a[j * ld + i];
}

struct Target {
  double total, optimum, tolerance;
  bool met(double error, int64_t order) const {
    const double rounding = order * std::numeric_limits<double>::epsilon() * total;
    return error <= (1.0 + tolerance) * optimum + rounding;
  }
};

// Top `rank` eigenvectors of the Gram matrix (destroyed) into w.factor (order x rank); returns the squared error. The
// tridiagonal problem is solved whole, by divide and conquer; only the vectors that are kept are transformed back.
double exact(double* gram, Workspace& w, int64_t order, int64_t rank, double total) {
  double* factor = grow(w.factor, order * rank);
  std::fill(factor, factor + order * rank, 0.0);
  if (total == 0.0) {
    for (int64_t j = 0; j < rank; ++j) factor[j * order + j] = 1.0;
    return 0.0;
  }
  const int64_t ld = padded(order);
  for (int64_t j = 0; j < order; ++j)  // so that no square over- or underflows
    for (int64_t i = j; i < order; ++i) gram[j * ld + i] /= total;
  complete_blocks(gram, order);
  double *values = grow(w.values, 3 * order), *off_diagonal = values + order, *tau = off_diagonal + order;
  tridiagonalise(gram, order, values, off_diagonal, tau, w.scratch);
  char vectors = 'I', side = 'L', no = 'N';
  int n = order, k = rank, m = n - 1, lda = ld, lwork = 1 + 4 * n + n * n, liwork = 3 + 5 * n, info = 0;
  if (static_cast<int>(w.integers.size()) < liwork) w.integers.resize(liwork);
  double* z = grow(w.basis, order * order);
  lapack().dstedc(&vectors, &n, values, off_diagonal, z, &n, grow(w.work, lwork), &lwork, w.integers.data(), &liwork, &info);
  check(info, "dstedc");
  for (int64_t j = 0; j < rank; ++j)  // eigenvalues ascend
    std::copy(z + (order - 1 - j) * order, z + (order - j) * order, factor + j * order);
  lwork = std::max(64 * k, 64 * 65);
  if (m > 0)
    lapack().dormqr(&side, &no, &m, &k, &m, gram + 1, &lda, tau, factor + 1, &n, grow(w.work, lwork), &lwork, &info);
  check(info, "dormqr");
  return total * std::max(0.0, 1.0 - top(w.values, order, rank));
}

// Randomized subspace iteration into w.factor; false if the certificate was not met.
bool sketched(double* gram, Workspace& w, int64_t order, int64_t rank, int64_t width, const Target& target, const RsvdOptions& o,
              uint64_t slice, double& error, int64_t& iterations) {
  double* basis = grow(w.basis, order * width);
  double* image = grow(w.image, order * width);
  double* small = grow(w.small, width * width);
  gaussian(o.seed, slice, image, order * width);
  product('N', 'N', order, width, order, gram, padded(order), image, order, basis, order);
  for (iterations = 1; iterations <= o.max_iterations; ++iterations) {
    orthonormalise(basis, order, width, w);
    product('N', 'N', order, width, order, gram, padded(order), basis, order, image, order);
    product('T', 'N', width, width, order, basis, order, image, order, small, width);
    eigen(small, width, w);
    error = std::max(0.0, target.total - top(w.values, width, rank));
    if (target.met(error, order)) {
      double* factor = grow(w.factor, order * rank);
      product('N', 'N', order, rank, width, basis, order, small + (width - rank) * width, width, factor, order);
      return true;
    }
    std::swap(w.basis, w.image);
    basis = w.basis.data();
    image = w.image.data();
  }
  return false;
}

// Split the projection U U^T W (or W V V^T) so that both factors carry sqrt(s): balanced for training and half precision.
// W^T U (width x rank) or W V (rows x rank) is computed a chunk of its rows at a time, straight into its factor.
template <typename T>
void write_factors(const Slice& slice, int64_t rank, Workspace& w, T* left, T* right) {
  const MatrixBatch& m = *slice.matrix;
  const bool wide = m.rows <= slice.width;
  const int64_t order = slice.order(), other = wide ? slice.width : m.rows;
  const T* base = static_cast<const T*>(m.data) + slice.item * m.rows * m.cols + slice.first;
  const int64_t step = std::clamp<int64_t>(CHUNK / order, 1, other);
  double* dense = grow(w.scratch, order * step);  // a chunk of W, row-major as W is
  double *projected = grow(w.image, step * rank), *squares = grow(w.values, rank);
  std::fill(squares, squares + rank, 0.0);
  T* out = wide ? right : left;
  const int64_t row = wide ? 1 : rank, column = wide ? other : 1;  // strides of the factor's entries
  for (int64_t start = 0; start < other; start += step) {
    const int64_t count = std::min(step, other - start), rows = wide ? order : count, cols = wide ? count : order;
    const T* chunk = base + (wide ? start : start * m.cols);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) dense[i * cols + j] = chunk[i * m.cols + j];
    product(wide ? 'N' : 'T', 'N', count, rank, order, dense, cols, w.factor.data(), order, projected, count);
    for (int64_t j = 0; j < rank; ++j)
      for (int64_t i = 0; i < count; ++i) {
        const double value = projected[j * count + i];
        squares[j] += value * value;
        out[(start + i) * row + j * column] = static_cast<T>(value);
      }
  }
  for (int64_t j = 0; j < rank; ++j) squares[j] = squares[j] > 0.0 ? std::pow(squares[j], 0.25) : 1.0;  // sqrt(s_j)
  for (int64_t i = 0; i < other; ++i)
    for (int64_t j = 0; j < rank; ++j) {
      T& value = out[wide ? j * other + i : i * rank + j];
      value = static_cast<T>(value / squares[j]);
    }
  for (int64_t j = 0; j < rank; ++j)
    for (int64_t i = 0; i < order; ++i) {
      const T value = static_cast<T>(w.factor[j * order + i] * squares[j]);
      (wide ? left[i * rank + j] : right[j * order + i]) = value;
    }
}

void factor_slice(const RsvdProblem& p, int64_t index, const RsvdOptions& o, Workspace& w) {
  const MatrixBatch& m = p.matrix;
  const int64_t slice_width = m.cols / p.groups;
  const Slice slice{&m, index / p.groups, (index % p.groups) * slice_width, slice_width};
  const int64_t order = slice.order(), width = std::min(order, p.rank + o.oversample);
  const int64_t ld = padded(order);
  double* g = grow(w.gram, ld * whole_blocks(order));
  gram(slice, g, w.scratch);
  double& total = p.norm[index];
  total = 0.0;
  for (int64_t i = 0; i < order; ++i) total += g[i * ld + i];
  if (!std::isfinite(total)) throw std::runtime_error("a value is NaN, infinite or too large to square");
  double& error = p.error[index];
  int64_t& iterations = p.iterations[index];
  bool done = false;
  if (width <= o.exact_fraction * order) {
    mirror(g, order, ld);
    done = sketched(g, w, order, p.rank, width, {total, p.optimum[index], o.tolerance}, o, index, error, iterations);
    if (!done) iterations = EXACT_BY_FALLBACK;
  } else {
    iterations = EXACT_BY_CHOICE;
  }
  if (!done) error = exact(g, w, order, p.rank, total);
  const int64_t left = index * m.rows * p.rank, right = index * p.rank * slice_width;
  if (m.is_double)
    write_factors<double>(slice, p.rank, w, static_cast<double*>(p.left) + left, static_cast<double*>(p.right) + right);
  else
    write_factors<float>(slice, p.rank, w, static_cast<float*>(p.left) + left, static_cast<float*>(p.right) + right);
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
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.cost > b.cost; });
  std::string failure;
#pragma omp parallel num_threads(threads)
  {
    Workspace workspace;
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < static_cast<int64_t>(tasks.size()); ++t) {
      try {
        factor_slice(problems[tasks[t].problem], tasks[t].slice, options, workspace);
      } catch (const std::exception& e) {
#pragma omp critical
        failure = e.what();
      }
    }
  }
  if (!failure.empty()) throw std::runtime_error(failure);
}

}  // namespace alds
