// LAPACK and BLAS come from scipy: scipy.linalg.cython_{lapack,blas}.__pyx_capi__ holds C function pointers.
#include <pybind11/pybind11.h>

#include "core.h"

namespace py = pybind11;

namespace alds {
namespace {

template <typename F>
void resolve(const py::dict& capi, const char* name, F& target) {
  py::object capsule = capi[name];
  void* pointer = PyCapsule_GetPointer(capsule.ptr(), PyCapsule_GetName(capsule.ptr()));
  if (!pointer) throw py::error_already_set();
  target = reinterpret_cast<F>(pointer);
}

Lapack load() {
  auto capi = [](const char* module) { return py::module_::import(module).attr("__pyx_capi__").cast<py::dict>(); };
  py::dict blas = capi("scipy.linalg.cython_blas"), lapack = capi("scipy.linalg.cython_lapack");
  Lapack l;
  resolve(blas, "dgemm", l.dgemm);
  resolve(lapack, "dsyevd", l.dsyevd);
  resolve(lapack, "dstedc", l.dstedc);
  resolve(lapack, "dormqr", l.dormqr);
  resolve(lapack, "dgeqrf", l.dgeqrf);
  resolve(lapack, "dorgqr", l.dorgqr);
  return l;
}

}  // namespace

const Lapack& lapack() {
  static const Lapack pointers = load();
  return pointers;
}

}  // namespace alds
