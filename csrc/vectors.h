// Vector kernels: blocks of k vectors as rows [k, n], row-major. Sums are double for any element type and run over
// chunks of fixed size, so that the bits do not depend on the number of threads. kernels/reference.py is the definition.
#pragma once
#include <cstdint>

template <class T>
struct VectorKernels {
  // out[k, m] = V W'. V is W for a symmetric result. Reads (k + m) n.
  void (*gram)(const T* V, int64_t k, const T* W, int64_t m, int64_t n, double* out, int threads);
  // theta = v.h, residual = |h - theta v|, out = h / |h| (zero row: zero). Two passes: reads 4kn, writes kn.
  void (*power_step)(const T* V, const T* H, int64_t k, int64_t n, double* theta, double* residual, T* out, int threads);
  // out[m, n] = C[m, k] V. Reads kn, writes mn.
  void (*combine)(const double* C, int64_t m, int64_t k, const T* V, int64_t n, T* out, int threads);
  // out[i, :] = V[i, :] * d. out may be V.
  void (*scale)(const T* V, int64_t k, int64_t n, const T* d, T* out, int threads);
  // out = (factor (sqrt(v / correction) + eps))^-1/2
  void (*inv_sqrt_adam)(const T* v, int64_t n, double correction, double eps, double factor, T* out, int threads);
};

struct KernelTable {
  const char* level;
  VectorKernels<float> f32;
  VectorKernels<double> f64;
};
