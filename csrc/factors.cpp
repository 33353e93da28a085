// The two factors of a slice from an orthonormal basis of the space that is kept. All sums are in float64.
#include "factors.h"

#include <algorithm>
#include <cmath>

#include "blas.h"

namespace alds {
namespace {

constexpr int64_t CHUNK = 1 << 20;  // doubles of W converted at a time: 8 MiB

}  // namespace

void widen(const float* narrow, int64_t order, int64_t rank, double* basis) {
  for (int64_t j = 0; j < rank; ++j) {
    const float* column = narrow + j * order;
    double square = 0.0;
    for (int64_t i = 0; i < order; ++i) square += double(column[i]) * column[i];
    const double scale = 1.0 / std::sqrt(square);
    for (int64_t i = 0; i < order; ++i) basis[j * order + i] = column[i] * scale;
  }
}

// Split the projection U U^T W (or W V V^T) so that both factors carry sqrt(s). That is balanced for training and half
// precision. W^T U (width x rank) or W V (rows x rank) is computed a chunk of its rows at a time, straight into its
// factor. It is over ||W|| at first, so that nothing over- or underflows.
template <typename S>
double write_factors(const Slice& slice, int64_t rank, double norm, double* basis, Buffer& scratch, S* left, S* right) {
  const MatrixBatch& whole = *slice.matrix;
  const bool wide = slice.wide();
  const int64_t order = slice.order(), other = wide ? slice.width : whole.rows;
  const S* base = static_cast<const S*>(whole.data) + slice.offset();
  const int64_t step = std::clamp<int64_t>(CHUNK / order, 1, other);
  double* dense = grow(scratch, order * step + step * rank + rank);  // a chunk of W, row-major as W is
  double *projected = dense + order * step, *squares = projected + step * rank, captured = 0.0;
  const double inverse = 1.0 / norm, root = std::sqrt(norm);
  std::fill(squares, squares + rank, 0.0);
  S* out = wide ? right : left;
  const int64_t row = wide ? 1 : rank, column = wide ? other : 1;  // strides of the factor's entries
  for (int64_t start = 0; start < other; start += step) {
    const int64_t count = std::min(step, other - start), rows = wide ? order : count, cols = wide ? count : order;
    const S* chunk = base + (wide ? start : start * whole.cols);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) dense[i * cols + j] = chunk[i * whole.cols + j] * inverse;
    gemm(wide ? 'N' : 'T', 'N', count, rank, order, 1.0, dense, cols, basis, order, 0.0, projected, count);
    for (int64_t j = 0; j < rank; ++j)
      for (int64_t i = 0; i < count; ++i) {
        const double value = projected[j * count + i];
        squares[j] += value * value;
        out[(start + i) * row + j * column] = static_cast<S>(value);
      }
  }
  for (int64_t j = 0; j < rank; ++j) {
    captured += squares[j];
    squares[j] = squares[j] > 0.0 ? std::pow(squares[j], 0.25) : 1.0;  // sqrt(s_j / norm)
  }
  for (int64_t i = 0; i < other; ++i)
    for (int64_t j = 0; j < rank; ++j) {
      S& value = out[wide ? j * other + i : i * rank + j];
      value = static_cast<S>(value / squares[j] * root);
    }
  for (int64_t j = 0; j < rank; ++j)
    for (int64_t i = 0; i < order; ++i) {
      const S value = static_cast<S>(basis[j * order + i] * squares[j] * root);
      (wide ? left[i * rank + j] : right[j * order + i]) = value;
    }
  return captured * norm * norm;
}

template double write_factors(const Slice&, int64_t, double, double*, Buffer&, float*, float*);
template double write_factors(const Slice&, int64_t, double, double*, Buffer&, double*, double*);

}  // namespace alds
