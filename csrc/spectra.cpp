// Spectra in float64, or in float32 with float64 for what float32 misses.
#include "spectra.h"

#include <algorithm>
#include <set>
#include <utility>

#include "buffer.h"

namespace alds {
namespace {

constexpr double MAX_OFF = 0x1p-21;  // of a slice's squared norm: 4 epsilons of float32

// Values of one entry of a problem's groups in float64, in their place in its output.
void recompute_in_float64(const SpectraProblem& problem, int entry, int threads) {
  const MatrixBatch& m = problem.matrix;
  const int64_t groups = problem.groups[entry], size = values_per_item(m, groups), row = row_size(problem);
  double* out = problem.out;
  for (int k = 0; k < entry; ++k) out += values_per_item(m, problem.groups[k]);
  Buffer exact(m.batch * size);
  singular_values<double>({{m, {groups}, exact.data()}}, threads);
  for (int64_t item = 0; item < m.batch; ++item)
    std::copy(exact.data() + item * size, exact.data() + (item + 1) * size, out + item * row);
}

}  // namespace

void spectra(const std::vector<SpectraProblem>& problems, bool float32, int threads) {
  if (!float32) {
    singular_values<double>(problems, threads);
    return;
  }
  // Sums of equal terms, or noise in the place of zeros: the squares do not add up to the norm.
  std::set<std::pair<int, int>> missed;
  for (const Miss& miss : singular_values<float>(problems, threads))
    if (!(miss.share <= MAX_OFF)) missed.emplace(miss.problem, miss.entry);
  for (const auto& [problem, entry] : missed) recompute_in_float64(problems[problem], entry, threads);
}

}  // namespace alds
