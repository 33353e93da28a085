"""Builds the C++ core; everything else is declared in pyproject.toml. No torch is needed to build."""

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

core = Pybind11Extension(
    "alds_fast.linalg._core",
    [
        "csrc/band.cpp",
        "csrc/bindings.cpp",
        "csrc/factors.cpp",
        "csrc/gram.cpp",
        "csrc/lapack.cpp",
        "csrc/ql.cpp",
        "csrc/rsvd.cpp",
        "csrc/spectra.cpp",
        "csrc/tridiagonal.cpp",
    ],
    depends=["csrc/buffer.h", "csrc/core.h", "csrc/reflector.h", "csrc/vector.h"],
    cxx_std=17,
    extra_compile_args=["-O3", "-fopenmp", "-Wno-psabi"],
    extra_link_args=["-fopenmp"],
)

setup(ext_modules=[core])
