#include "norms.h"

#include <algorithm>

namespace alds {

double squared_norm(const Slice& slice) {
  const MatrixBatch& m = *slice.matrix;
  const int64_t first = slice.offset();
  double sum = 0.0;
  for (int64_t i = 0; i < m.rows; ++i) {
    double row = 0.0;
#pragma omp simd reduction(+ : row)
    for (int64_t j = 0; j < slice.width; ++j) {
      const int64_t k = first + i * m.cols + j;
      const double value = m.is_double ? static_cast<const double*>(m.data)[k] : static_cast<const float*>(m.data)[k];
      row += value * value;
    }
    sum += row;
  }
  return sum;
}

void squared_columns(const MatrixBatch& m, int64_t item, double* squares) {
  std::fill(squares, squares + m.cols, 0.0);
  auto add = [&](const auto* row) {
#pragma omp simd
    for (int64_t j = 0; j < m.cols; ++j) squares[j] += double(row[j]) * row[j];
  };
  for (int64_t i = item * m.rows; i < (item + 1) * m.rows; ++i)
    m.is_double ? add(static_cast<const double*>(m.data) + i * m.cols)
                : add(static_cast<const float*>(m.data) + i * m.cols);
}

}  // namespace alds
