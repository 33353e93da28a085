// LAPACK and BLAS come from scipy: scipy.linalg.cython_{lapack,blas}.__pyx_capi__ holds C function pointers.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "core.h"

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
Lapack<T> load(const std::string& type) {
  auto capi = [](const char* module) { return py::module_::import(module).attr("__pyx_capi__").cast<py::dict>(); };
  py::dict blas = capi("scipy.linalg.cython_blas"), lapack = capi("scipy.linalg.cython_lapack");
  Lapack<T> l;
  resolve(blas, type + "gemm", l.gemm);
  resolve(blas, type + "symm", l.symm);
  resolve(blas, type + "trmm", l.trmm);
  resolve(lapack, type + "syevd", l.syevd);
  resolve(lapack, type + "stedc", l.stedc);
  resolve(lapack, type + "ormqr", l.ormqr);
  resolve(lapack, type + "geqrf", l.geqrf);
  resolve(lapack, type + "larft", l.larft);
  resolve(lapack, type + "orgqr", l.orgqr);
  return l;
}

}  // namespace

template <>
const Lapack<double>& lapack() {
  static const Lapack<double> pointers = load<double>("d");
  return pointers;
}

template <>
const Lapack<float>& lapack() {
  static const Lapack<float> pointers = load<float>("s");
  return pointers;
}

void check(int info, const char* routine) {
  if (info != 0) throw std::runtime_error(std::string(routine) + " failed with info = " + std::to_string(info));
}

void load_lapack() {
  lapack<double>();
  lapack<float>();
}

}  // namespace alds
