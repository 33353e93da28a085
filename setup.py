"""Builds the C++ core; everything else is declared in pyproject.toml. No torch is needed to build."""

from glob import glob

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

core = Pybind11Extension(
    "alds_fast.linalg._core",
    [
        "csrc/band.cpp",
        "csrc/basis.cpp",
        "csrc/bindings.cpp",
        "csrc/blas.cpp",
        "csrc/factors.cpp",
        "csrc/gram.cpp",
        "csrc/norms.cpp",
        "csrc/ql.cpp",
        "csrc/rsvd.cpp",
        "csrc/shared_grams.cpp",
        "csrc/singular_values.cpp",
        "csrc/spectra.cpp",
        "csrc/tridiagonal.cpp",
    ],
    depends=sorted(glob("csrc/*.h")),
    cxx_std=17,
    extra_compile_args=["-O3", "-fopenmp", "-Wno-psabi"],
    extra_link_args=["-fopenmp"],
)

setup(ext_modules=[core])
