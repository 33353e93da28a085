// BLAS and LAPACK out of scipy: scipy.linalg.cython_{lapack,blas}.__pyx_capi__ holds C function pointers.
#include "blas.h"

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace alds {
namespace {

template <typename F>
void resolve(const py::dict& capi, const std::string& name, F& target) {
  py::object capsule = capi[name.c_str()];
  void* pointer = PyCapsule_GetPointer(capsule.ptr(), PyCapsule_GetName(capsule.ptr()));
  if (!pointer) throw py::error_already_set();
  target = reinterpret_cast<F>(pointer);
}

template <typename T>
BlasPointers<T> load(const std::string& type) {
  auto capi = [](const char* module) { return py::module_::import(module).attr("__pyx_capi__").cast<py::dict>(); };
  py::dict blas = capi("scipy.linalg.cython_blas"), lapack = capi("scipy.linalg.cython_lapack");
  BlasPointers<T> pointers;
  resolve(blas, type + "gemm", pointers.gemm);
  resolve(blas, type + "symm", pointers.symm);
  resolve(blas, type + "trmm", pointers.trmm);
  resolve(lapack, type + "syevd", pointers.syevd);
  resolve(lapack, type + "stedc", pointers.stedc);
  resolve(lapack, type + "ormqr", pointers.ormqr);
  resolve(lapack, type + "geqrf", pointers.geqrf);
  resolve(lapack, type + "larft", pointers.larft);
  resolve(lapack, type + "orgqr", pointers.orgqr);
  return pointers;
}

}  // namespace

template <>
const BlasPointers<double>& blas_pointers() {
  static const BlasPointers<double> pointers = load<double>("d");
  return pointers;
}

template <>
const BlasPointers<float>& blas_pointers() {
  static const BlasPointers<float> pointers = load<float>("s");
  return pointers;
}

void check_info(int info, const char* routine) {
  if (info != 0) throw std::runtime_error(std::string(routine) + " failed with info = " + std::to_string(info));
}

void load_blas() {
  blas_pointers<double>();
  blas_pointers<float>();
}

}  // namespace alds
