// Vectors of a cache line, for loops over aligned blocks of rows.
#pragma once
#include <cstdint>
#include <cstring>

// One binary for every x86-64: the loops below are compiled for AVX-512, AVX2 and the baseline, chosen at load time.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define ALDS_CLONES __attribute__((target_clones("avx512f", "arch=haswell", "default")))
#else
#define ALDS_CLONES
#endif
#define ALDS_INLINE static inline __attribute__((always_inline))

namespace alds {

template <typename T>
constexpr int64_t lanes = 64 / sizeof(T);  // values in a vector: one AVX-512 register, two of AVX2
template <typename T>
struct Vectors;
template <>
struct Vectors<double> {
  typedef double Line __attribute__((vector_size(64)));
  typedef double Loose __attribute__((vector_size(64), aligned(8)));  // anywhere
  typedef int64_t Numbers __attribute__((vector_size(64)));
  typedef double Eight __attribute__((vector_size(64)));
  typedef int64_t Integers __attribute__((vector_size(64)));
};
template <>
struct Vectors<float> {
  typedef float Line __attribute__((vector_size(64)));
  typedef float Loose __attribute__((vector_size(64), aligned(4)));
  typedef int32_t Numbers __attribute__((vector_size(64)));
  typedef float Eight __attribute__((vector_size(32)));
  typedef int32_t Integers __attribute__((vector_size(32)));
};
template <typename T>
using Line = typename Vectors<T>::Line;
template <typename T>
using Eight = typename Vectors<T>::Eight;  // one value for each of COLS columns

constexpr int64_t COLS = 8;  // columns that are worked on together
constexpr int64_t LANES = lanes<double>;
using Vector = Line<double>;
using Integers = Vectors<double>::Integers;

template <typename T>
ALDS_INLINE Line<T>& at(T* x) {
  return *reinterpret_cast<Line<T>*>(x);
}
template <typename T>
ALDS_INLINE const Line<T>& at(const T* x) {
  return *reinterpret_cast<const Line<T>*>(x);
}
template <typename T>
ALDS_INLINE Eight<T>& eight(T* x) {
  return *reinterpret_cast<Eight<T>*>(x);
}

// A line's values added up until eight are left.
ALDS_INLINE Eight<double> folded(const Line<double>& x) { return x; }
ALDS_INLINE Eight<float> folded(const Line<float>& x) {
  Eight<float> halves[2];
  std::memcpy(halves, &x, sizeof(x));
  return halves[0] + halves[1];
}

// Value c of the result is the sum of x[c]'s lanes.
template <typename T>
ALDS_INLINE Eight<T> sums(const Line<T>* x) {
  using Integers = typename Vectors<T>::Integers;
  static_assert(COLS == 8, "the shuffles are written for eight columns");
  const Integers a1 = {0, 8, 2, 10, 4, 12, 6, 14}, b1 = {1, 9, 3, 11, 5, 13, 7, 15};
  const Integers a2 = {0, 1, 8, 9, 4, 5, 12, 13}, b2 = {2, 3, 10, 11, 6, 7, 14, 15};
  const Integers a3 = {0, 1, 2, 3, 8, 9, 10, 11}, b3 = {4, 5, 6, 7, 12, 13, 14, 15};
  Eight<T> y[8], pairs[4], fours[2];
  for (int i = 0; i < 8; ++i) y[i] = folded(x[i]);
  for (int i = 0; i < 4; ++i)
    pairs[i] = __builtin_shuffle(y[2 * i], y[2 * i + 1], a1) + __builtin_shuffle(y[2 * i], y[2 * i + 1], b1);
  for (int i = 0; i < 2; ++i)
    fours[i] =
        __builtin_shuffle(pairs[2 * i], pairs[2 * i + 1], a2) + __builtin_shuffle(pairs[2 * i], pairs[2 * i + 1], b2);
  return __builtin_shuffle(fours[0], fours[1], a3) + __builtin_shuffle(fours[0], fours[1], b3);
}

// The same for as many columns as a line has lanes.
template <typename T>
ALDS_INLINE Line<T> line_sums(const Line<T>* x) {
  Line<T> result;
  for (int64_t c = 0; c < lanes<T>; c += COLS) {
    const Eight<T> part = sums<T>(x + c);
    std::memcpy(reinterpret_cast<char*>(&result) + c * sizeof(T), &part, sizeof(part));
  }
  return result;
}

// 0, 1, 2, ... by lane
template <typename T>
ALDS_INLINE typename Vectors<T>::Numbers numbered() {
  typename Vectors<T>::Numbers lane;
  for (int i = 0; i < lanes<T>; ++i) lane[i] = i;
  return lane;
}

}  // namespace alds
