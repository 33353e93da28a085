// Counter-based standard normals. They are the same for any number of threads.
#pragma once
#include <cmath>
#include <cstdint>

namespace alds {

// A hash: all bits of x into all bits of the result.
inline uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

// From 0 to 1, without the ends.
inline double uniform(uint64_t bits) { return (static_cast<double>(bits >> 11) + 0.5) * 0x1.0p-53; }

// `count` normals into out, from a hash of (seed, stream, index). T: float or double. Throws nothing.
template <typename T>
void gaussian(uint64_t seed, uint64_t stream, T* out, int64_t count) {
  const uint64_t key = mix(seed ^ mix(stream));
  for (int64_t i = 0; i < count; i += 2) {
    const double radius = std::sqrt(-2.0 * std::log(uniform(mix(key + i))));
    const double angle = 6.283185307179586 * uniform(mix(key + i + 1));
    out[i] = static_cast<T>(radius * std::cos(angle));
    if (i + 1 < count) out[i + 1] = static_cast<T>(radius * std::sin(angle));
  }
}

}  // namespace alds
