#include "shared_grams.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

#include "blocks.h"
#include "gram.h"
#include "norms.h"
#include "parallel.h"

namespace alds {
namespace {

bool is_wide(const MatrixBatch& m, int64_t groups) { return m.rows <= m.cols / groups; }

// Wide group counts are served by a multiple, tall ones by a divisor.
template <typename T>
bool serves(const Root<T>& root, const MatrixBatch& m, int64_t groups) {
  if (root.wide != is_wide(m, groups)) return false;
  return root.wide ? root.groups % groups == 0 : groups % root.groups == 0;
}

double sum_of(const Buffer& squares, int64_t first, int64_t count) {
  return squares.empty() ? 0.0 : std::accumulate(squares.begin() + first, squares.begin() + first + count, 0.0);
}

void compute_squares(std::vector<SharedGrams<double>>&, int) {}
void compute_squares(std::vector<SharedGrams<float>>& weights, int threads) {
  for (SharedGrams<float>& w : weights) w.squares.resize(w.matrix->batch * w.matrix->cols);
  parallel_for<Nothing>(weights.size(), threads, [&](int64_t i, Nothing&) {
    const MatrixBatch& m = *weights[i].matrix;
    for (int64_t item = 0; item < m.batch; ++item) squared_columns(m, item, weights[i].squares.data() + item * m.cols);
  });
}

// A product to compute: the Gram matrix of a slice of a root.
template <typename T>
struct Product {
  const SharedGrams<T>* weight;
  Slice slice;
  T* out;  // order x order
  double cost;
};

template <typename T>
std::vector<Product<T>> allocate_products(std::vector<SharedGrams<T>>& weights) {
  std::vector<Product<T>> products;
  for (SharedGrams<T>& w : weights)
    for (Root<T>& root : w.roots) {
      const MatrixBatch& m = *w.matrix;
      const int64_t width = m.cols / root.groups, order = std::min(m.rows, width);
      root.grams.resize(m.batch * root.groups * order * order);
      T* out = root.grams.data();
      for (int64_t item = 0; item < m.batch; ++item)
        for (int64_t g = 0; g < root.groups; ++g, out += order * order)
          products.push_back({&w, slice_of(m, root.groups, item, g), out, double(order) * m.rows * width});
    }
  return products;
}

template <typename T>
struct Scratch {
  BufferOf<T> gram, pack;
};

}  // namespace

template <typename T>
SharedGrams<T> plan_grams(const MatrixBatch& m, const std::vector<int64_t>& groups) {
  SharedGrams<T> grams{&m, &groups, {}, {}, {}};
  std::vector<Root<T>>& roots = grams.roots;
  auto serving = [&](int64_t k) {
    return std::find_if(roots.begin(), roots.end(), [&](const Root<T>& r) { return serves(r, m, k); });
  };
  auto visit = [&](int64_t k) {
    if (serving(k) == roots.end()) roots.push_back({k, is_wide(m, k), {}});
  };
  std::vector<int64_t> order(groups);
  std::sort(order.begin(), order.end());
  for (auto k = order.rbegin(); k != order.rend(); ++k)
    if (is_wide(m, *k)) visit(*k);
  for (int64_t k : order)
    if (!is_wide(m, k)) visit(k);
  for (int64_t k : groups) grams.root_of.push_back(static_cast<int>(serving(k) - roots.begin()));
  return grams;
}

template <typename T>
void compute_grams(std::vector<SharedGrams<T>>& weights, int threads) {
  compute_squares(weights, threads);
  std::vector<Product<T>> products = allocate_products(weights);
  parallel_tasks<Scratch<T>>(products, threads, [&](const Product<T>& p, Scratch<T>& scratch) {
    const int64_t order = p.slice.order(), ld = padded<T>(order);
    T* g = grow(scratch.gram, blocks_size<T>(order));
    gram(p.slice, 1.0 / divisor(*p.weight, p.slice.item), g, scratch.pack);
    for (int64_t j = 0; j < order; ++j) std::copy(g + j * ld + j, g + j * ld + order, p.out + j * order + j);
  });
}

template <typename T>
void read_gram(const SharedGrams<T>& grams, size_t entry, const Slice& slice, T* out) {
  const Root<T>& root = grams.roots[grams.root_of[entry]];
  const MatrixBatch& m = *grams.matrix;
  const int64_t groups = (*grams.groups)[entry], g = slice.first / slice.width;
  const int64_t order = slice.order(), ld = padded<T>(order);
  const int64_t root_order = std::min(m.rows, m.cols / root.groups), size = root_order * root_order;
  const T* base = root.grams.data() + slice.item * root.groups * size;
  const int64_t parts = root.wide ? root.groups / groups : 1;
  base += root.wide ? g * parts * size : g / (groups / root.groups) * size;
  const int64_t corner = root.wide ? 0 : g % (groups / root.groups) * order * (root_order + 1);
  for (int64_t j = 0; j < order; ++j) {
    const T* column = base + corner + j * root_order;
    std::copy(column + j, column + order, out + j * ld + j);
    for (int64_t p = 1; p < parts; ++p)
      for (int64_t i = j; i < order; ++i) out[j * ld + i] += column[p * size + i];
  }
}

template <typename T>
double divisor(const SharedGrams<T>& grams, int64_t item) {
  if (grams.squares.empty()) return 1.0;
  const int64_t cols = grams.matrix->cols;
  const double norm = std::sqrt(sum_of(grams.squares, item * cols, cols));
  if (!std::isfinite(norm)) throw std::runtime_error(NOT_FINITE);
  return norm > 0.0 ? norm : 1.0;
}

template <typename T>
double known_square(const SharedGrams<T>& grams, const Slice& slice) {
  return sum_of(grams.squares, slice.item * grams.matrix->cols + slice.first, slice.width);
}

#define ALDS_FOR(T)                                                                    \
  template SharedGrams<T> plan_grams(const MatrixBatch&, const std::vector<int64_t>&); \
  template void compute_grams(std::vector<SharedGrams<T>>&, int);                      \
  template void read_gram(const SharedGrams<T>&, size_t, const Slice&, T*);            \
  template double divisor(const SharedGrams<T>&, int64_t);                             \
  template double known_square(const SharedGrams<T>&, const Slice&);
ALDS_FOR(double)
ALDS_FOR(float)
#undef ALDS_FOR

}  // namespace alds
