// Householder reflectors.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "vector.h"

namespace alds {

// Reflector that maps x (entries at most 1) to (beta, 0, ..., 0); x becomes v with v[0] = 1. Returns tau.
template <typename T>
ALDS_INLINE T reflector(int64_t n, T* x, T& beta) {
  const T nothing = std::numeric_limits<T>::min() / std::numeric_limits<T>::epsilon();
  T tail = 0;
#pragma omp simd reduction(+ : tail)
  for (int64_t i = 1; i < n; ++i) tail += x[i] * x[i];
  const T alpha = x[0];
  x[0] = 1;
  beta = alpha;
  if (tail < nothing) {  // the squares have lost their digits
    std::fill(x + 1, x + n, T{});
    return T{};
  }
  beta = -std::copysign(std::sqrt(alpha * alpha + tail), alpha);
  const T scale = T{1} / (alpha - beta);
#pragma omp simd
  for (int64_t i = 1; i < n; ++i) x[i] *= scale;
  return (beta - alpha) / beta;
}

}  // namespace alds
