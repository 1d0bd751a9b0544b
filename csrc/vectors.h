// Vector kernels: blocks of k vectors as rows [k, n], row-major. Sums are double for any element type and run over
// chunks of fixed size, so that the bits do not depend on the number of threads. kernels/reference.py is the
// definition.
#pragma once
#include "kernel.h"

// T is float or double.
#define VECTOR_KERNELS(KERNEL)                                                                                   \
  /* out[k, m] = V W'. V is W for a symmetric result. Reads (k + m) n. */                                        \
  KERNEL(gram, const T* V, int64_t k, const T* W, int64_t m, int64_t n, double* out)                             \
  /* theta = v.h, residual = |h - theta v|, out = h / |h| (zero row: zero). Two passes: reads 4kn, writes kn. */ \
  KERNEL(power_step, const T* V, const T* H, int64_t k, int64_t n, double* theta, double* residual, T* out)      \
  /* out[m, n] = C[m, k] V. Reads kn, writes mn. */                                                              \
  KERNEL(combine, const double* C, int64_t m, int64_t k, const T* V, int64_t n, T* out)                          \
  /* out[i, :] = V[i, :] * d. out may be V. */                                                                   \
  KERNEL(scale, const T* V, int64_t k, int64_t n, const T* d, T* out)                                            \
  /* out = (factor (sqrt(v / correction) + eps))^-1/2 */                                                         \
  KERNEL(inv_sqrt_adam, const T* v, int64_t n, double correction, double eps, double factor, T* out)

// On: what follows these arguments on a backend. CPU: threads. CUDA: a workspace and a stream.
template <class T, class... On>
struct VectorKernels {
#define POINTER(name, ...) void (*name)(__VA_ARGS__, On...);
  VECTOR_KERNELS(POINTER)
#undef POINTER
};

template <class T>
using CpuVectorKernels = VectorKernels<T, int>;
