// Pointwise products and rows of probabilities. Formulas: sharpkern/kernels/pointwise.py and softmax.py.
#pragma once
#include <cstdint>

template <class T>
struct RowKernels {
  // out = slope d + curvature dz for slope, curvature [n] and d, dz, out [k, n]. Null curvature and dz: absent.
  void (*slope_product)(const T* slope, const T* d, const T* curvature, const T* dz, int64_t k, int64_t n, T* out,
                        int threads);
  // mean = <p, u>, out = weight p (u - mean) for p [rows, C] and u, out [k, rows, C]. Null weight: ones.
  void (*softmax_jacobian)(const T* p, const T* u, const T* weight, int64_t k, int64_t rows, int64_t C, T* out, T* mean,
                           int threads);
  // out = p (dg - <p, dg> - <dp, inner>) + dp inner for p, inner [rows, C] and dp, dg, out [k, rows, C].
  void (*softmax_backward_tangent)(const T* p, const T* dp, const T* inner, const T* dg, int64_t k, int64_t rows,
                                   int64_t C, T* out, int threads);
};

struct RowTable {
  RowKernels<float> f32;
  RowKernels<double> f64;
};
