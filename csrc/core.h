// Shared types of the C++ core: small structs, no Python, no allocation policy.
#pragma once
#include <cstdint>
#include <vector>

#include "buffer.h"

namespace alds {

// Function pointers into the LAPACK/BLAS that scipy ships (Fortran calling convention, 32-bit integers), for float and
// double: names without their first letter.
template <typename T>
struct Lapack {
  using Int = int;
  void (*gemm)(char*, char*, Int*, Int*, Int*, T*, T*, Int*, T*, Int*, T*, T*, Int*);
  void (*symm)(char*, char*, Int*, Int*, T*, T*, Int*, T*, Int*, T*, T*, Int*);
  void (*trmm)(char*, char*, char*, char*, Int*, Int*, T*, T*, Int*, T*, Int*);
  void (*syevd)(char*, char*, Int*, T*, Int*, T*, T*, Int*, Int*, Int*, Int*);
  void (*stedc)(char*, Int*, T*, T*, T*, Int*, T*, Int*, Int*, Int*, Int*);
  void (*ormqr)(char*, char*, Int*, Int*, Int*, T*, Int*, T*, T*, Int*, T*, Int*, Int*);
  void (*geqrf)(Int*, Int*, T*, Int*, T*, T*, Int*, Int*);
  void (*larft)(char*, char*, Int*, Int*, T*, Int*, T*, T*, Int*);
  void (*orgqr)(Int*, Int*, Int*, T*, Int*, T*, T*, Int*, Int*);
};

template <typename T>
const Lapack<T>& lapack();
void load_lapack();                         // resolves them; needs the GIL the first time
void check(int info, const char* routine);  // throws if a routine failed

// A batch of row-major matrices, batch x rows x cols, in float32 or float64.
struct MatrixBatch {
  const void* data;
  bool is_double;
  int64_t batch, rows, cols;
};

// One slice: columns [first, first + width) of matrix `item` of a batch.
struct Slice {
  const MatrixBatch* matrix;
  int64_t item, first, width;
  int64_t order() const { return matrix->rows < width ? matrix->rows : width; }  // size of the smaller Gram matrix
};

// Storage of a symmetric matrix for tridiagonalise: column-major on a vector's boundary, whole_blocks(order) columns of
// leading dimension padded(order), lower triangle. complete_blocks fills in what it needs beside that. T: float or
// double.
template <typename T>
int64_t whole_blocks(int64_t order);
template <typename T>
int64_t padded(int64_t order);
template <typename T>
void complete_blocks(T* a, int64_t order);

// Tridiagonal form of such a matrix (destroyed), entries at most 1: diagonal (n), off_diagonal (n - 1), tau (n - 1),
// the scalar factors of the reflectors, which are left below the first subdiagonal as dsytrd leaves them.
template <typename T>
void tridiagonalise(T* a, int64_t n, T* diagonal, T* off_diagonal, T* tau, BufferOf<T>& scratch);

// The same for large matrices and values only, in two stages: faster from an order of LARGE on.
constexpr int64_t LARGE = 1024;
template <typename T>
void tridiagonalise_large(T* a, int64_t n, T* diagonal, T* off_diagonal, BufferOf<T>& scratch);

// A -= V W^T + W V^T on rows and columns begin .. end, the lower triangle and diagonal blocks of such a matrix; V and W
// have `width` columns of leading dimension ld, begin is a multiple of a vector's lanes.
template <typename T>
void rank_two_update(int64_t begin, int64_t end, int64_t width, T* a, const T* v, const T* w, int64_t ld);

constexpr const char* NOT_FINITE = "a value is NaN, infinite or too large to square";
double squared_norm(const Slice& slice);  // Frobenius

// Gram matrix of a slice times `scale` on its smaller side: W W^T if rows <= width, else W^T W.
// Stored as for tridiagonalise, on a vector's boundary, lower triangle; scratch is grown as needed.
template <typename T>
void gram(const Slice& slice, double scale, T* g, BufferOf<T>& scratch);

// Eigenvalues, unordered, of up to LANES tridiagonal matrices, one per vector lane: each diagonal[i] (n) becomes them,
// off_diagonal[i] (n - 1) is only read. Absolute error about machine epsilon times the norm.
void tridiagonal_eigenvalues(int64_t n, int64_t count, double* const* diagonal, const double* const* off_diagonal,
                             Buffer& scratch);

// The basis in float64, its columns of norm 1 again: what is left of their not being orthonormal changes the squared
// error by the square of float32's epsilon.
void widen(const float* single, int64_t order, int64_t rank, double* basis);

// Factors of a slice of norm `norm` projected onto the space of an orthonormal basis (order x rank) of its smaller
// side, both carrying the root of the singular values; returns the squared norm of the projection. S: the matrix's
// type.
template <typename S>
double write_factors(const Slice& slice, int64_t rank, double norm, double* basis, Buffer& scratch, S* left, S* right);

struct SpectraProblem {
  MatrixBatch matrix;
  std::vector<int64_t> groups;  // each divides matrix.cols
  double* out;                  // batch x sum_k k * min(rows, cols / k), descending within a slice
};
void spectra(const std::vector<SpectraProblem>& problems, bool single, int threads);  // single: in float32

struct RsvdOptions {
  uint64_t seed;
  int64_t oversample, max_iterations;
  double tolerance, exact_fraction;
};
struct RsvdProblem {
  MatrixBatch matrix;
  int64_t groups, rank;
  const double* optimum;  // batch*groups: least possible squared error of each slice
  void* left;             // batch*groups x rows x rank, in the matrix's type
  void* right;            // batch*groups x rank x width
  double* norm;           // batch*groups: squared Frobenius norm of each slice
  double* error;          // batch*groups: squared error reached
  int64_t* iterations;    // batch*groups: power iterations, EXACT_* where the exact decomposition ran
};
constexpr int64_t EXACT_BY_CHOICE = -1;    // rank too close to full for a sketch to pay
constexpr int64_t EXACT_BY_FALLBACK = -2;  // the certificate was not met in max_iterations
void batched_rsvd(const std::vector<RsvdProblem>& problems, const RsvdOptions& options, int threads);

}  // namespace alds
