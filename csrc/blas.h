// Typed calls of the BLAS and LAPACK that scipy ships. T: float or double.
//
// Arguments are those of the Fortran routines, by value. Matrices are column-major, sizes are 32-bit integers, and
// workspaces are the caller's. LAPACK routines throw std::runtime_error with the name and the code if they fail.
#pragma once

namespace alds {

// Function pointers, in the Fortran calling convention. Names are without their first letter.
template <typename T>
struct BlasPointers {
  void (*gemm)(const char*, const char*, const int*, const int*, const int*, const T*, const T*, const int*, const T*,
               const int*, const T*, T*, const int*);
  void (*symm)(const char*, const char*, const int*, const int*, const T*, const T*, const int*, const T*, const int*,
               const T*, T*, const int*);
  void (*trmm)(const char*, const char*, const char*, const char*, const int*, const int*, const T*, const T*,
               const int*, T*, const int*);
  void (*syevd)(const char*, const char*, const int*, T*, const int*, T*, T*, const int*, int*, const int*, int*);
  void (*stedc)(const char*, const int*, T*, T*, T*, const int*, T*, const int*, int*, const int*, int*);
  void (*ormqr)(const char*, const char*, const int*, const int*, const int*, const T*, const int*, const T*, T*,
                const int*, T*, const int*, int*);
  void (*geqrf)(const int*, const int*, T*, const int*, T*, T*, const int*, int*);
  void (*larft)(const char*, const char*, const int*, const int*, const T*, const int*, const T*, T*, const int*);
  void (*orgqr)(const int*, const int*, const int*, T*, const int*, const T*, T*, const int*, int*);
};

template <typename T>
const BlasPointers<T>& blas_pointers();

// Resolves all pointers. Needs the GIL the first time; afterwards any thread may call the routines.
// Throws what the import of scipy raises.
void load_blas();

// Throws unless info is 0.
void check_info(int info, const char* routine);

// C = alpha op(A) op(B) + beta C
template <typename T>
void gemm(char op_a, char op_b, int m, int n, int k, T alpha, const T* a, int lda, const T* b, int ldb, T beta, T* c,
          int ldc) {
  blas_pointers<T>().gemm(&op_a, &op_b, &m, &n, &k, &alpha, a, &lda, b, &ldb, &beta, c, &ldc);
}

// C = alpha A B + beta C or C = alpha B A + beta C, A symmetric
template <typename T>
void symm(char side, char uplo, int m, int n, T alpha, const T* a, int lda, const T* b, int ldb, T beta, T* c,
          int ldc) {
  blas_pointers<T>().symm(&side, &uplo, &m, &n, &alpha, a, &lda, b, &ldb, &beta, c, &ldc);
}

// B = alpha op(A) B or B = alpha B op(A), A triangular
template <typename T>
void trmm(char side, char uplo, char op_a, char diag, int m, int n, T alpha, const T* a, int lda, T* b, int ldb) {
  blas_pointers<T>().trmm(&side, &uplo, &op_a, &diag, &m, &n, &alpha, a, &lda, b, &ldb);
}

// Eigenvalues, ascending, and eigenvectors of a symmetric matrix.
template <typename T>
void syevd(char job, char uplo, int n, T* a, int lda, T* values, T* work, int lwork, int* iwork, int liwork) {
  int info = 0;
  blas_pointers<T>().syevd(&job, &uplo, &n, a, &lda, values, work, &lwork, iwork, &liwork, &info);
  check_info(info, "syevd");
}

// The same of a tridiagonal matrix, by divide and conquer.
template <typename T>
void stedc(char job, int n, T* diagonal, T* off_diagonal, T* z, int ldz, T* work, int lwork, int* iwork, int liwork) {
  int info = 0;
  blas_pointers<T>().stedc(&job, &n, diagonal, off_diagonal, z, &ldz, work, &lwork, iwork, &liwork, &info);
  check_info(info, "stedc");
}

// QR factorisation: R and the reflectors of Q.
template <typename T>
void geqrf(int m, int n, T* a, int lda, T* tau, T* work, int lwork) {
  int info = 0;
  blas_pointers<T>().geqrf(&m, &n, a, &lda, tau, work, &lwork, &info);
  check_info(info, "geqrf");
}

// The first n columns of Q from its k reflectors.
template <typename T>
void orgqr(int m, int n, int k, T* a, int lda, const T* tau, T* work, int lwork) {
  int info = 0;
  blas_pointers<T>().orgqr(&m, &n, &k, a, &lda, tau, work, &lwork, &info);
  check_info(info, "orgqr");
}

// C = op(Q) C or C = C op(Q) from Q's k reflectors.
template <typename T>
void ormqr(char side, char op_q, int m, int n, int k, const T* a, int lda, const T* tau, T* c, int ldc, T* work,
           int lwork) {
  int info = 0;
  blas_pointers<T>().ormqr(&side, &op_q, &m, &n, &k, a, &lda, tau, c, &ldc, work, &lwork, &info);
  check_info(info, "ormqr");
}

// The triangular factor of a block reflector.
template <typename T>
void larft(char direction, char stored, int n, int k, const T* v, int ldv, const T* tau, T* t, int ldt) {
  blas_pointers<T>().larft(&direction, &stored, &n, &k, v, &ldv, tau, t, &ldt);
}

}  // namespace alds
