// Gram matrices of all slices of a weight for all its group counts, from as few products as possible.
//
// A slice with rows <= width uses W W^T, and the Gram matrix of a coarse slice is the SUM of those of the finer slices
// inside it. A slice with rows > width uses W^T W, a DIAGONAL BLOCK of that of the coarser slice around it. So only
// "root" group counts need products. Every other one is read off a root.
#pragma once
#include <cstdint>
#include <vector>

#include "buffer.h"
#include "matrix.h"

namespace alds {

// A group count with products of its own.
template <typename T>
struct Root {
  int64_t groups;
  bool wide;          // rows <= width
  BufferOf<T> grams;  // batch x groups x order x order, lower triangles
};

// The Gram matrices of one weight, in T: float or double. Those of an item are over the square of its divisor.
// Matrix and groups are the caller's and must live as long.
template <typename T>
struct SharedGrams {
  const MatrixBatch* matrix;
  const std::vector<int64_t>* groups;
  Buffer squares;  // batch x cols: squared norms of the columns; empty in float64, which needs none
  std::vector<Root<T>> roots;
  std::vector<int> root_of;  // index into roots for every entry of groups
};

// Chooses the roots of a weight and computes nothing. Throws std::bad_alloc.
template <typename T>
SharedGrams<T> plan_grams(const MatrixBatch& matrix, const std::vector<int64_t>& groups);

// Computes squares and roots of all weights on `threads` threads.
// Throws std::bad_alloc, and in float32 std::runtime_error if a squared norm is not finite.
template <typename T>
void compute_grams(std::vector<SharedGrams<T>>& weights, int threads);

// The Gram matrix of a slice of groups[entry] into `out`: blocks_size<T>(order) values as blocks.h says, lower
// triangle. Throws nothing.
template <typename T>
void read_gram(const SharedGrams<T>& grams, size_t entry, const Slice& slice, T* out);

// What an item of the weight is divided by before its products: in float32 its norm, so that nothing over- or
// underflows, and 1 in float64. Throws std::runtime_error if the norm is not finite.
template <typename T>
double divisor(const SharedGrams<T>& grams, int64_t item);

// Squared norm of a slice, 0 where it is not known: in float64. Throws nothing.
template <typename T>
double known_square(const SharedGrams<T>& grams, const Slice& slice);

}  // namespace alds
