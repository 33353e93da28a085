// Batched randomized SVD: a basis and two factors for each slice, in the order of their cost.
//
// The basis of a float32 slice is computed in float32 where its error is well above what such arithmetic loses. Its
// projection and the certificate are float64 all the same. Where the certificate fails, the basis is computed again in
// float64.
#include "rsvd.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <vector>

#include "factors.h"
#include "norms.h"
#include "parallel.h"

namespace alds {
namespace {

constexpr double FLOAT_EPSILONS = 8.0;  // of ||W||^2 that the tolerance must come to for float32 to be tried (measured)

bool float_may_do(const Target& t) {
  return t.tolerance * t.optimum >= FLOAT_EPSILONS * std::numeric_limits<float>::epsilon() * t.total;
}

struct Workspaces {
  Workspace<float> float32;
  Workspace<double> full;
};

void factor_slice(const RsvdProblem& p, int64_t index, const RsvdOptions& o, Workspaces& w) {
  const MatrixBatch& m = p.matrix;
  const Slice slice = slice_of(m, p.groups, index / p.groups, index % p.groups);
  const int64_t order = slice.order(), left = index * m.rows * p.rank, right = index * p.rank * slice.width;
  const double total = p.norm[index] = squared_norm(slice), norm = total > 0.0 ? std::sqrt(total) : 1.0;
  if (!std::isfinite(total)) throw std::runtime_error(NOT_FINITE);
  const Target target{total, p.optimum[index], o.tolerance};
  auto write = [&] {
    const double captured =
        m.is_double ? write_factors(slice, p.rank, norm, w.full.factor.data(), w.full.scratch,
                                    static_cast<double*>(p.left) + left, static_cast<double*>(p.right) + right)
                    : write_factors(slice, p.rank, norm, w.full.factor.data(), w.full.scratch,
                                    static_cast<float*>(p.left) + left, static_cast<float*>(p.right) + right);
    p.error[index] = std::max(0.0, total - captured);
    return std::isfinite(captured) && target.met(p.error[index], order);
  };
  if (total == 0.0) {
    double* factor = grow(w.full.factor, order * p.rank);
    std::fill(factor, factor + order * p.rank, 0.0);
    for (int64_t j = 0; j < p.rank; ++j) factor[j * order + j] = 1.0;
    p.iterations[index] = EXACT_BY_CHOICE;
    write();
    return;
  }
  const bool sketches = o.exact_fraction > 0.0;  // else the errors are asked for to the last digit
  if (sketches && !m.is_double && float_may_do(target)) {
    p.iterations[index] = basis_of(slice, p.rank, target, o, index, w.float32);
    widen(w.float32.factor.data(), order, p.rank, grow(w.full.factor, order * p.rank));
    if (write()) return;
  }
  p.iterations[index] = basis_of(slice, p.rank, target, o, index, w.full);
  write();
}

}  // namespace

void batched_rsvd(const std::vector<RsvdProblem>& problems, const RsvdOptions& options, int threads) {
  struct Task {
    int64_t problem, slice;
    double cost;
  };
  std::vector<Task> tasks;
  for (size_t p = 0; p < problems.size(); ++p) {
    const MatrixBatch& m = problems[p].matrix;
    const double order = std::min(m.rows, m.cols / problems[p].groups);
    const double cost = order * (double(m.rows) * m.cols / problems[p].groups + order * order);
    for (int64_t s = 0; s < m.batch * problems[p].groups; ++s) tasks.push_back({int64_t(p), s, cost});
  }
  parallel_tasks<Workspaces>(tasks, threads, [&](const Task& t, Workspaces& workspaces) {
    factor_slice(problems[t.problem], t.slice, options, workspaces);
  });
}

}  // namespace alds
