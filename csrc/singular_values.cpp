// Gram matrix, tridiagonal form, eigenvalues, square roots: a step at a time for all slices of all weights.
#include "singular_values.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <stdexcept>

#include "band.h"
#include "blocks.h"
#include "norms.h"
#include "parallel.h"
#include "ql.h"
#include "shared_grams.h"
#include "tridiagonal.h"
#include "vector.h"

namespace alds {
namespace {

// A slice on its way to singular values: the tridiagonal form of its Gram matrix over the largest entry.
struct SliceTask {
  int problem, entry;  // as in Miss
  Slice slice;
  double *diagonal, *off_diagonal;  // diagonal is the slice's place in the output
  double cost;
  double largest, square;  // the largest entry; what the eigenvalues add up to, 0 if that is not known
  double missed;           // by how much of it they missed it
};

// Off-diagonals lie in `off_diagonals`.
std::vector<SliceTask> slice_tasks(const std::vector<SpectraProblem>& problems, Buffer& off_diagonals) {
  std::vector<SliceTask> tasks;
  int64_t total = 0;
  for (size_t p = 0; p < problems.size(); ++p) {
    const MatrixBatch& m = problems[p].matrix;
    const int64_t row = row_size(problems[p]);
    int64_t offset = 0;
    for (size_t entry = 0; entry < problems[p].groups.size(); ++entry) {
      const int64_t groups = problems[p].groups[entry], order = std::min(m.rows, m.cols / groups);
      for (int64_t item = 0; item < m.batch; ++item)
        for (int64_t g = 0; g < groups; ++g, total += order) {
          double* out = problems[p].out + item * row + offset + g * order;
          const double cost = std::pow(double(order), 3);
          tasks.push_back({int(p), int(entry), slice_of(m, groups, item, g), out, nullptr, cost, 0.0, 0.0, 0.0});
        }
      offset += values_per_item(m, groups);
    }
  }
  double* next = grow(off_diagonals, total);
  for (SliceTask& t : tasks) {
    t.off_diagonal = next;
    next += t.slice.order();
  }
  return tasks;
}

template <typename T>
struct Scratch {
  BufferOf<T> matrix, work;
};

// Tridiagonal form of a slice's Gram matrix.
template <typename T>
void reduce(SliceTask& task, const SharedGrams<T>& grams, Scratch<T>& scratch) {
  const int64_t n = task.slice.order(), ld = padded<T>(n), size = blocks_size<T>(n);
  T *gram = grow(scratch.matrix, size + 3 * n), *diagonal = gram + size, *off_diagonal = diagonal + n;
  T* tau = off_diagonal + n;
  read_gram(grams, task.entry, task.slice, gram);
  T largest = 0, trace = 0;  // the largest entry of a positive semidefinite matrix is on its diagonal
  for (int64_t i = 0; i < n; ++i) {
    largest = std::max(largest, gram[i * ld + i]);
    trace += gram[i * ld + i];
  }
  if (!std::isfinite(trace)) throw std::runtime_error(NOT_FINITE);
  task.largest = largest * std::pow(divisor(grams, task.slice.item), 2);
  task.square = known_square(grams, task.slice);
  if (largest == 0) largest = 1;
  for (int64_t j = 0; j < n; ++j)  // so that no square over- or underflows
    for (int64_t i = j; i < n; ++i) gram[j * ld + i] /= largest;
  complete_blocks(gram, n);
  if (n < LARGE) tridiagonalise(gram, n, diagonal, off_diagonal, tau, scratch.work);
  else tridiagonalise_large(gram, n, diagonal, off_diagonal, scratch.work);
  std::copy(diagonal, diagonal + n, task.diagonal);
  std::copy(off_diagonal, off_diagonal + n - 1, task.off_diagonal);
}

// Singular values, descending, from the eigenvalues in `values`; they are scaled to what they shall add up to.
void take_roots(SliceTask& task, double* values, int64_t n) {
  std::sort(values, values + n, std::greater<double>());
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) sum += std::max(values[i], 0.0);
  const double known = task.square, scale = known > 0.0 && sum > 0.0 ? known / sum : task.largest;
  if (known > 0.0) task.missed = std::abs(sum * task.largest - known) / known;
  for (int64_t i = 0; i < n; ++i) values[i] = std::sqrt(std::max(values[i], 0.0) * scale);
}

// Up to LANES slices of one order, for the QL iteration.
struct LaneTask {
  SliceTask* slices;
  int64_t count;
  double cost;
};

// Slices of one order stand side by side.
std::vector<LaneTask> lane_tasks(std::vector<SliceTask>& slices) {
  std::vector<LaneTask> tasks;
  for (size_t begin = 0, end = 0; begin < slices.size(); begin = end) {
    const int64_t order = slices[begin].slice.order();
    while (end < slices.size() && end - begin < LANES && slices[end].slice.order() == order) ++end;
    tasks.push_back({&slices[begin], int64_t(end - begin), std::pow(double(order), 2)});
  }
  return tasks;
}

// Singular values in place of the diagonals.
void finish(const LaneTask& task, Buffer& scratch) {
  double *diagonal[LANES] = {}, *off_diagonal[LANES] = {};
  for (int64_t k = 0; k < task.count; ++k) {
    diagonal[k] = task.slices[k].diagonal;
    off_diagonal[k] = task.slices[k].off_diagonal;
  }
  const int64_t n = task.slices->slice.order();
  tridiagonal_eigenvalues(n, task.count, diagonal, off_diagonal, scratch);
  for (int64_t k = 0; k < task.count; ++k) take_roots(task.slices[k], diagonal[k], n);
}

}  // namespace

template <typename T>
std::vector<Miss> singular_values(const std::vector<SpectraProblem>& problems, int threads) {
  std::vector<SharedGrams<T>> weights;
  for (const SpectraProblem& p : problems) weights.push_back(plan_grams<T>(p.matrix, p.groups));
  compute_grams(weights, threads);

  Buffer off_diagonals;
  std::vector<SliceTask> slices = slice_tasks(problems, off_diagonals);
  parallel_tasks<Scratch<T>>(slices, threads,
                             [&](SliceTask& t, Scratch<T>& scratch) { reduce(t, weights[t.problem], scratch); });
  std::vector<LaneTask> side_by_side = lane_tasks(slices);  // the loop has sorted the slices by their order
  parallel_tasks<Buffer>(side_by_side, threads, [&](const LaneTask& t, Buffer& scratch) { finish(t, scratch); });

  std::vector<Miss> misses;
  for (const SliceTask& t : slices) misses.push_back({t.problem, t.entry, t.missed});
  return misses;
}

template std::vector<Miss> singular_values<double>(const std::vector<SpectraProblem>&, int);
template std::vector<Miss> singular_values<float>(const std::vector<SpectraProblem>&, int);

}  // namespace alds
