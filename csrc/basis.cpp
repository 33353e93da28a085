// Sketched and exact bases, on the smaller Gram matrix of a slice.
//
// Q spans the sketch; T = Q^T G Q. The sum of T's `rank` largest eigenvalues is the energy that the truncated factors
// capture, so ||W||_F^2 minus it is their exact squared error (Halko, Martinsson, Tropp 2011, sections 4.3 and 5).
// Power iterations go on until that is within (1 + tolerance) of the optimum known from the spectrum.
#include "basis.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "blas.h"
#include "blocks.h"
#include "gaussian.h"
#include "gram.h"
#include "tridiagonal.h"

namespace alds {
namespace {

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

// Randomized subspace iteration into w.factor, on the Gram matrix over `target.total`.
// False: the certificate was not met.
template <typename T>
bool sketched(T* gram, Workspace<T>& w, int64_t order, int64_t rank, int64_t width, const Target& target,
              const RsvdOptions& o, uint64_t stream, int64_t& iterations) {
  T *basis = grow(w.basis, order * width), *image = grow(w.image, order * width), *small = grow(w.small, width * width);
  gaussian(o.seed, stream, image, order * width);
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

}  // namespace

template <typename T>
int64_t basis_of(const Slice& slice, int64_t rank, const Target& target, const RsvdOptions& o, uint64_t stream,
                 Workspace<T>& w) {
  const int64_t order = slice.order(), width = std::min(order, rank + o.oversample), ld = padded<T>(order);
  T* g = grow(w.gram, blocks_size<T>(order));
  gram(slice, 1.0 / std::sqrt(target.total), g, w.scratch);  // so that no square over- or underflows
  int64_t iterations = EXACT_BY_CHOICE;
  if (width <= o.exact_fraction * order) {
    mirror(g, order, ld);
    if (sketched(g, w, order, rank, width, target, o, stream, iterations)) return iterations;
    iterations = EXACT_BY_FALLBACK;
  }
  exact(g, w, order, rank);
  return iterations;
}

template int64_t basis_of(const Slice&, int64_t, const Target&, const RsvdOptions&, uint64_t, Workspace<double>&);
template int64_t basis_of(const Slice&, int64_t, const Target&, const RsvdOptions&, uint64_t, Workspace<float>&);

}  // namespace alds
