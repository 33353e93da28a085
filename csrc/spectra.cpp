// Singular values of all channel slices for all group counts, from shared Gram matrices.
//
// A slice with rows <= width uses W W^T, and the Gram matrix of a coarse slice is the SUM of those of the finer
// slices inside it. A slice with rows > width uses W^T W, a DIAGONAL BLOCK of that of the coarser slice around it.
// So only "root" group counts need a product; every other one is read off a root.
#include "spectra.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "band.h"
#include "blocks.h"
#include "gram.h"
#include "norms.h"
#include "parallel.h"
#include "ql.h"
#include "tridiagonal.h"
#include "vector.h"

namespace alds {
namespace {

constexpr double MAX_OFF = 0x1p-21;  // of a slice's squared norm: 4 epsilons of float32

template <typename T>
struct Root {
  int64_t groups;
  bool wide;
  BufferOf<T> grams;  // batch x groups x order x order
};

// A weight whose Gram matrices are computed in T.
template <typename T>
struct Layer {
  const SpectraProblem* problem;
  Buffer squares;  // of every item's columns; for float32 only
  std::vector<Root<T>> roots;
  std::vector<int> root_of;      // index into roots for every entry of problem->groups
  std::vector<int64_t> offsets;  // of every entry of problem->groups in a row of the output
  int64_t row_size = 0;
};

bool is_wide(const MatrixBatch& m, int64_t groups) { return m.rows <= m.cols / groups; }

// Fewest roots: wide group counts are served by a multiple, tall ones by a divisor.
template <typename T>
void choose_roots(Layer<T>& layer) {
  const auto& groups = layer.problem->groups;
  const MatrixBatch& m = layer.problem->matrix;
  std::vector<int64_t> order(groups);
  std::sort(order.begin(), order.end());
  auto serves = [&](int64_t root, int64_t k, bool wide) { return wide ? root % k == 0 : k % root == 0; };
  auto visit = [&](int64_t k) {
    bool wide = is_wide(m, k);
    for (const Root<T>& r : layer.roots)
      if (r.wide == wide && serves(r.groups, k, wide)) return;
    layer.roots.push_back({k, wide, {}});
  };
  for (auto k = order.rbegin(); k != order.rend(); ++k)
    if (is_wide(m, *k)) visit(*k);
  for (int64_t k : order)
    if (!is_wide(m, k)) visit(k);
  for (int64_t k : groups) {
    bool wide = is_wide(m, k);
    auto found = std::find_if(layer.roots.begin(), layer.roots.end(),
                              [&](const Root<T>& r) { return r.wide == wide && serves(r.groups, k, wide); });
    layer.root_of.push_back(static_cast<int>(found - layer.roots.begin()));
    layer.offsets.push_back(layer.row_size);
    layer.row_size += k * std::min(m.rows, m.cols / k);
  }
}

// Gram matrix (lower triangle, leading dimension padded<T>(order)) of slice `g` of `groups`, read off its root.
template <typename T>
void gather(const Layer<T>& layer, const Root<T>& root, int64_t item, int64_t groups, int64_t g, T* out) {
  const MatrixBatch& m = layer.problem->matrix;
  const int64_t order = std::min(m.rows, m.cols / groups), ld = padded<T>(order);
  const int64_t root_order = std::min(m.rows, m.cols / root.groups), size = root_order * root_order;
  const T* base = root.grams.data() + item * root.groups * size;
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

struct Task {
  int layer, index;  // index into roots (products) or problem->groups (eigenvalues)
  int64_t item, slice;
  double cost;
  int64_t number;
};

template <typename T>
struct Scratch {
  BufferOf<T> matrix, work;
};

// In float32 Gram matrices are those of an item over its norm, so that nothing over- or underflows, and the sums of
// eigenvalues are mended by the norms.
void measure(std::vector<Layer<double>>&, int) {}
void measure(std::vector<Layer<float>>& layers, int threads) {
  for (Layer<float>& layer : layers) layer.squares.resize(layer.problem->matrix.batch * layer.problem->matrix.cols);
  parallel_for<Nothing>(layers.size(), threads, [&](int64_t l, Nothing&) {
    const MatrixBatch& m = layers[l].problem->matrix;
    for (int64_t i = 0; i < m.batch; ++i) squared_columns(m, i, layers[l].squares.data() + i * m.cols);
  });
}

double sum_of(const Buffer& squares, int64_t first, int64_t count) {
  return squares.empty() ? 0.0 : std::accumulate(squares.begin() + first, squares.begin() + first + count, 0.0);
}

template <typename T>
double divisor(const Layer<T>& layer, int64_t item) {
  if (layer.squares.empty()) return 1.0;
  const int64_t cols = layer.problem->matrix.cols;
  const double norm = std::sqrt(sum_of(layer.squares, item * cols, cols));
  if (!std::isfinite(norm)) throw std::runtime_error(NOT_FINITE);
  return norm > 0.0 ? norm : 1.0;
}

template <typename T>
void products(std::vector<Layer<T>>& layers, int threads) {
  std::vector<Task> tasks;
  for (size_t l = 0; l < layers.size(); ++l) {
    const MatrixBatch& m = layers[l].problem->matrix;
    for (size_t r = 0; r < layers[l].roots.size(); ++r) {
      Root<T>& root = layers[l].roots[r];
      const int64_t width = m.cols / root.groups, order = std::min(m.rows, width);
      root.grams.resize(m.batch * root.groups * order * order);
      for (int64_t i = 0; i < m.batch; ++i)
        for (int64_t g = 0; g < root.groups; ++g)
          tasks.push_back({int(l), int(r), i, g, double(order) * m.rows * width, 0});
    }
  }
  parallel_tasks<Scratch<T>>(tasks, threads, [&](const Task& t, Scratch<T>& scratch) {
    const MatrixBatch& m = layers[t.layer].problem->matrix;
    Root<T>& root = layers[t.layer].roots[t.index];
    const int64_t width = m.cols / root.groups, order = std::min(m.rows, width), ld = padded<T>(order);
    T *g = grow(scratch.matrix, ld * whole_blocks<T>(order)),
      *out = root.grams.data() + (t.item * root.groups + t.slice) * order * order;
    gram(slice_of(m, root.groups, t.item, t.slice), 1.0 / divisor(layers[t.layer], t.item), g, scratch.work);
    for (int64_t j = 0; j < order; ++j) std::copy(g + j * ld + j, g + j * ld + order, out + j * order + j);
  });
}

// A slice on its way to singular values: the tridiagonal form of its Gram matrix over the largest entry.
struct Tridiagonal {
  int64_t order;
  double *diagonal, *off_diagonal;  // diagonal is the slice's place in the output
  double largest, squares;          // the largest entry; the sum that the eigenvalues shall have, 0 if none is known
  double off;                       // by how much of it they missed it
  int layer, index;                 // of problem->groups
};

// Tridiagonal form of every slice; off-diagonals lie in `couplings`, in the order of the tasks.
template <typename T>
std::vector<Tridiagonal> reduce(const std::vector<Layer<T>>& layers, Buffer& couplings, int threads) {
  std::vector<Task> tasks;
  std::vector<Tridiagonal> found;
  int64_t total = 0;
  for (size_t l = 0; l < layers.size(); ++l) {
    const SpectraProblem& p = *layers[l].problem;
    for (size_t k = 0; k < p.groups.size(); ++k) {
      const int64_t width = p.matrix.cols / p.groups[k], order = std::min(p.matrix.rows, width);
      for (int64_t i = 0; i < p.matrix.batch; ++i)
        for (int64_t g = 0; g < p.groups[k]; ++g) {
          double* out = p.out + i * layers[l].row_size + layers[l].offsets[k] + g * order;
          tasks.push_back({int(l), int(k), i, g, std::pow(double(order), 3), int64_t(found.size())});
          found.push_back({order, out, nullptr, 0.0, sum_of(layers[l].squares, i * p.matrix.cols + g * width, width),
                           0.0, int(l), int(k)});
          total += order;
        }
    }
  }
  couplings.resize(total);
  total = 0;
  for (Tridiagonal& t : found) {
    t.off_diagonal = couplings.data() + total;
    total += t.order;
  }
  parallel_tasks<Scratch<T>>(tasks, threads, [&](const Task& t, Scratch<T>& scratch) {
    const Layer<T>& layer = layers[t.layer];
    Tridiagonal& target = found[t.number];
    const int64_t n = target.order, ld = padded<T>(n), size = ld * whole_blocks<T>(n);
    T *gram = grow(scratch.matrix, size + 3 * n), *diagonal = gram + size, *off_diagonal = diagonal + n,
      *tau = off_diagonal + n;
    gather(layer, layer.roots[layer.root_of[t.index]], t.item, layer.problem->groups[t.index], t.slice, gram);
    T largest = 0, trace = 0;  // the largest entry of a positive semidefinite matrix is on its diagonal
    for (int64_t i = 0; i < n; ++i) {
      largest = std::max(largest, gram[i * ld + i]);
      trace += gram[i * ld + i];
    }
    if (!std::isfinite(trace)) throw std::runtime_error(NOT_FINITE);
    target.largest = largest * std::pow(divisor(layer, t.item), 2);
    if (largest == 0) largest = 1;
    for (int64_t j = 0; j < n; ++j)  // so that no square over- or underflows
      for (int64_t i = j; i < n; ++i) gram[j * ld + i] /= largest;
    complete_blocks(gram, n);
    if (n < LARGE) tridiagonalise(gram, n, diagonal, off_diagonal, tau, scratch.work);
    else tridiagonalise_large(gram, n, diagonal, off_diagonal, scratch.work);
    std::copy(diagonal, diagonal + n, target.diagonal);
    std::copy(off_diagonal, off_diagonal + n - 1, target.off_diagonal);
  });
  return found;
}

// Singular values in place of the diagonals, LANES slices of one order at a time.
void finish(std::vector<Tridiagonal>& slices, int threads) {
  std::stable_sort(slices.begin(), slices.end(), [](const auto& a, const auto& b) { return a.order > b.order; });
  std::vector<Task> tasks;
  for (size_t begin = 0; begin < slices.size();) {
    size_t end = begin;
    while (end < slices.size() && end - begin < LANES && slices[end].order == slices[begin].order) ++end;
    tasks.push_back({int(begin), int(end), 0, 0, std::pow(double(slices[begin].order), 2), 0});
    begin = end;
  }
  parallel_tasks<Buffer>(tasks, threads, [&](const Task& t, Buffer& scratch) {
    double *diagonal[LANES] = {}, *off_diagonal[LANES] = {};
    for (int k = t.layer; k < t.index; ++k) {
      diagonal[k - t.layer] = slices[k].diagonal;
      off_diagonal[k - t.layer] = slices[k].off_diagonal;
    }
    const int64_t n = slices[t.layer].order;
    tridiagonal_eigenvalues(n, t.index - t.layer, diagonal, off_diagonal, scratch);
    for (int k = t.layer; k < t.index; ++k) {
      double* values = slices[k].diagonal;
      std::sort(values, values + n, std::greater<double>());
      double sum = 0.0;
      for (int64_t i = 0; i < n; ++i) sum += std::max(values[i], 0.0);
      const double known = slices[k].squares, scale = known > 0.0 && sum > 0.0 ? known / sum : slices[k].largest;
      if (known > 0.0) slices[k].off = std::abs(sum * slices[k].largest - known) / known;
      for (int64_t i = 0; i < n; ++i) values[i] = std::sqrt(std::max(values[i], 0.0) * scale);
    }
  });
}

template <typename T>
std::vector<Tridiagonal> spectra_in(const std::vector<SpectraProblem>& problems, int threads) {
  std::vector<Layer<T>> layers(problems.size());
  for (size_t i = 0; i < problems.size(); ++i) {
    layers[i].problem = &problems[i];
    choose_roots(layers[i]);
  }
  measure(layers, threads);
  products(layers, threads);
  Buffer couplings;
  std::vector<Tridiagonal> slices = reduce(layers, couplings, threads);
  finish(slices, threads);
  return slices;
}

}  // namespace

void spectra(const std::vector<SpectraProblem>& problems, bool single, int threads) {
  if (!single) {
    spectra_in<double>(problems, threads);
    return;
  }
  // Where eigenvalues do not add up to the norm (sums of equal terms, noise in the place of zeros), float64 has to do
  // it.
  std::vector<std::vector<char>> missed(problems.size());
  for (size_t i = 0; i < problems.size(); ++i) missed[i].resize(problems[i].groups.size());
  for (const Tridiagonal& t : spectra_in<float>(problems, threads))
    if (!(t.off <= MAX_OFF)) missed[t.layer][t.index] = 1;
  for (size_t i = 0; i < problems.size(); ++i) {
    const MatrixBatch& m = problems[i].matrix;
    int64_t row = 0, offset = 0;
    for (int64_t k : problems[i].groups) row += k * std::min(m.rows, m.cols / k);
    for (size_t k = 0; k < problems[i].groups.size(); ++k) {
      const int64_t groups = problems[i].groups[k], size = groups * std::min(m.rows, m.cols / groups);
      if (missed[i][k]) {
        Buffer exact(m.batch * size);
        spectra_in<double>({{m, {groups}, exact.data()}}, threads);
        for (int64_t b = 0; b < m.batch; ++b)
          std::copy(exact.data() + b * size, exact.data() + (b + 1) * size, problems[i].out + b * row + offset);
      }
      offset += size;
    }
  }
}

}  // namespace alds
