// Python bindings: argument checks and calls only. Arrays are C-contiguous float32 or float64.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <vector>

#include "blas.h"
#include "rsvd.h"
#include "spectra.h"

namespace py = pybind11;
using alds::MatrixBatch;

namespace {

[[noreturn]] void reject(const std::string& argument, const std::string& problem) {
  throw py::value_error(argument + ": " + problem);
}

MatrixBatch matrix_batch(const py::array& array, const std::string& argument) {
  if (array.ndim() != 3)
    reject(argument, "expected 3 dimensions (batch, rows, cols), got " + std::to_string(array.ndim()));
  const bool is_double = py::isinstance<py::array_t<double>>(array),
             is_float = py::isinstance<py::array_t<float>>(array);
  if (!is_double && !is_float) reject(argument, "expected float32 or float64");
  if (!(array.flags() & py::array::c_style)) reject(argument, "expected a C-contiguous array");
  if (array.size() == 0) reject(argument, "is empty");
  if (array.shape(1) > INT32_MAX / 64 || array.shape(2) > INT32_MAX / 64)
    reject(argument, "is too large for 32-bit LAPACK");
  return {array.data(), is_double, array.shape(0), array.shape(1), array.shape(2)};
}

void check_groups(int64_t groups, const MatrixBatch& m, const std::string& argument) {
  if (groups < 1 || m.cols % groups != 0)
    reject(argument, std::to_string(groups) + " does not divide the " + std::to_string(m.cols) + " columns");
}

void check_lengths(size_t got, size_t expected, const char* argument) {
  if (got != expected) reject(argument, "has length " + std::to_string(got) + ", expected " + std::to_string(expected));
}

void check_threads(int threads) {
  if (threads < 1) reject("threads", "expected at least 1, got " + std::to_string(threads));
}

std::vector<py::array_t<double>> spectra(const std::vector<py::array>& matrices,
                                         const std::vector<std::vector<int64_t>>& groups, bool float32, int threads) {
  check_threads(threads);
  check_lengths(groups.size(), matrices.size(), "groups");
  std::vector<py::array_t<double>> results;
  std::vector<alds::SpectraProblem> problems;
  for (size_t i = 0; i < matrices.size(); ++i) {
    const MatrixBatch m = matrix_batch(matrices[i], "matrices[" + std::to_string(i) + "]");
    int64_t size = 0;
    for (int64_t k : groups[i]) {
      check_groups(k, m, "groups[" + std::to_string(i) + "]");
      size += alds::values_per_item(m, k);
    }
    results.emplace_back(std::vector<int64_t>{m.batch, size});
    problems.push_back({m, groups[i], results.back().mutable_data()});
  }
  alds::load_blas();
  py::gil_scoped_release release;
  alds::spectra(problems, float32, threads);
  return results;
}

py::tuple batched_rsvd(const std::vector<py::array>& matrices, const std::vector<int64_t>& groups,
                       const std::vector<int64_t>& ranks, const std::vector<py::array_t<double>>& optima, uint64_t seed,
                       int64_t oversample, int64_t max_iterations, double tolerance, double exact_fraction,
                       int threads) {
  check_threads(threads);
  check_lengths(groups.size(), matrices.size(), "groups");
  check_lengths(ranks.size(), matrices.size(), "ranks");
  check_lengths(optima.size(), matrices.size(), "optima");
  if (oversample < 0) reject("oversample", "expected at least 0");
  std::vector<py::array> lefts, rights;
  std::vector<py::array_t<double>> norms, errors;
  std::vector<py::array_t<int64_t>> iterations;
  std::vector<alds::RsvdProblem> problems;
  for (size_t i = 0; i < matrices.size(); ++i) {
    const std::string at = "[" + std::to_string(i) + "]";
    const MatrixBatch m = matrix_batch(matrices[i], "matrices" + at);
    check_groups(groups[i], m, "groups" + at);
    const int64_t width = m.cols / groups[i], slices = m.batch * groups[i], rank = ranks[i];
    if (rank < 1 || rank > std::min(m.rows, width))
      reject("ranks" + at, std::to_string(rank) + " is outside 1.." + std::to_string(std::min(m.rows, width)));
    if (std::min(m.rows, width) > 46000)
      reject("matrices" + at, "slices of more than 46000 rows are too large for 32-bit LAPACK");
    check_lengths(optima[i].size(), slices, "optima");
    const py::dtype type = m.is_double ? py::dtype::of<double>() : py::dtype::of<float>();
    lefts.emplace_back(type, std::vector<int64_t>{slices, m.rows, rank});
    rights.emplace_back(type, std::vector<int64_t>{slices, rank, width});
    norms.emplace_back(slices);
    errors.emplace_back(slices);
    iterations.emplace_back(slices);
    problems.push_back({m, groups[i], rank, optima[i].data(), lefts.back().mutable_data(), rights.back().mutable_data(),
                        norms.back().mutable_data(), errors.back().mutable_data(), iterations.back().mutable_data()});
  }
  alds::load_blas();
  {
    py::gil_scoped_release release;
    alds::batched_rsvd(problems, {seed, oversample, max_iterations, tolerance, exact_fraction}, threads);
  }
  return py::make_tuple(lefts, rights, norms, errors, iterations);
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "Batched spectra and randomized SVD of channel slices (C++, OpenMP, LAPACK through scipy).";
  m.attr("EXACT_BY_CHOICE") = alds::EXACT_BY_CHOICE;
  m.attr("EXACT_BY_FALLBACK") = alds::EXACT_BY_FALLBACK;
  m.def("spectra", &spectra, py::arg("matrices"), py::arg("groups"), py::arg("float32"), py::arg("threads"));
  m.def("batched_rsvd", &batched_rsvd, py::arg("matrices"), py::arg("groups"), py::arg("ranks"), py::arg("optima"),
        py::arg("seed"), py::arg("oversample"), py::arg("max_iterations"), py::arg("tolerance"),
        py::arg("exact_fraction"), py::arg("threads"));
}
