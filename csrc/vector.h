// Vectors of a cache line, for loops over aligned blocks of rows.
#pragma once
#include <cstdint>

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
  typedef double Eight __attribute__((vector_size(64)));
  typedef int64_t Integers __attribute__((vector_size(64)));
};
template <>
struct Vectors<float> {
  typedef float Line __attribute__((vector_size(64)));
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
ALDS_INLINE Line<T>& at(T* x) { return *reinterpret_cast<Line<T>*>(x); }
template <typename T>
ALDS_INLINE const Line<T>& at(const T* x) { return *reinterpret_cast<const Line<T>*>(x); }
template <typename T>
ALDS_INLINE Eight<T>& eight(T* x) { return *reinterpret_cast<Eight<T>*>(x); }

}  // namespace alds
