// Gram matrix of a slice on its smaller side.
#pragma once
#include "buffer.h"
#include "matrix.h"

namespace alds {

// The product is W W^T if rows <= width, else W^T W. Every entry of W is multiplied by `scale` first.
// g holds blocks_size<T>(order) values, stored as blocks.h says; its lower triangle is written. Sums are in T: float or
// double. The scratch buffer is grown as needed; growing may throw std::bad_alloc.
template <typename T>
void gram(const Slice& slice, double scale, T* g, BufferOf<T>& scratch);

}  // namespace alds
