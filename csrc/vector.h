// Vectors of eight doubles, for loops over aligned blocks of LANES rows.
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

constexpr int64_t LANES = 8;  // doubles in a vector: one AVX-512 register, two of AVX2
typedef double Vector __attribute__((vector_size(LANES * sizeof(double))));
typedef int64_t Integers __attribute__((vector_size(LANES * sizeof(int64_t))));

ALDS_INLINE Vector& at(double* x) { return *reinterpret_cast<Vector*>(x); }
ALDS_INLINE const Vector& at(const double* x) { return *reinterpret_cast<const Vector*>(x); }

}  // namespace alds
