// Pointwise products, rows of probabilities, transposition. Formulas: sharpkern/kernels/pointwise.py and softmax.py.
#pragma once
#include "kernel.h"

// out = slope d + curvature dz for slope, curvature [n] and d, dz, out [k, n]. Null curvature and dz: absent.
template <class T>
struct SlopeProduct {
  FIELDS(const T* slope, *d, *curvature, *dz; T * out; int64_t k, n;)
  const char* refusal() const {
    if (k < 0 || n < 0) return "a size is negative";
    if (k == 0 || n == 0) return nullptr;
    return slope && d && out && (!curvature || dz) ? nullptr : "an operand is missing";
  }
};

// mean = <p, u>, out = weight p (u - mean) for p [rows, C] and u, out [k, rows, C]. Null weight: ones.
template <class T>
struct SoftmaxJacobian {
  FIELDS(const T* p, *u, *weight; T * out, *mean; int64_t k, rows, C;)
  const char* refusal() const {
    if (k < 0 || rows < 0 || C < 0) return "a size is negative";
    if (k == 0 || rows == 0) return nullptr;
    return mean && (C == 0 || (p && u && out)) ? nullptr : "an operand is missing";
  }
};

// out = p (dg - <p, dg> - <dp, inner>) + dp inner for p, inner [rows, C] and dp, dg, out [k, rows, C].
template <class T>
struct SoftmaxBackwardTangent {
  FIELDS(const T* p, *dp, *inner, *dg; T * out; int64_t k, rows, C;)
  const char* refusal() const {
    if (k < 0 || rows < 0 || C < 0) return "a size is negative";
    if (k == 0 || rows == 0 || C == 0) return nullptr;
    return p && dp && inner && dg && out ? nullptr : "an operand is missing";
  }
};

// out = u - <p, u> for p [rows, C] and u, out [k, rows, C].
template <class T>
struct LogSoftmaxJacobian {
  FIELDS(const T* p, *u; T * out; int64_t k, rows, C;)
  const char* refusal() const {
    if (k < 0 || rows < 0 || C < 0) return "a size is negative";
    if (k == 0 || rows == 0 || C == 0) return nullptr;
    return p && u && out ? nullptr : "an operand is missing";
  }
};

// out = dg - p (sum dg + dl total) for p [rows, C], total [rows] and dl, dg, out [k, rows, C].
template <class T>
struct LogSoftmaxBackwardTangent {
  FIELDS(const T* p, *dl, *total, *dg; T * out; int64_t k, rows, C;)
  const char* refusal() const {
    if (k < 0 || rows < 0 || C < 0) return "a size is negative";
    if (k == 0 || rows == 0 || C == 0) return nullptr;
    return p && dl && total && dg && out ? nullptr : "an operand is missing";
  }
};

// out [k, n] = the transpose of columns [n, k].
template <class T>
struct Transpose {
  FIELDS(const T* columns; T * out; int64_t n, k;)
  const char* refusal() const {
    if (k < 0 || n < 0) return "a size is negative";
    return k == 0 || n == 0 || (columns && out) ? nullptr : "an operand is missing";
  }
};

#define ROW_KERNELS(KERNEL)                                       \
  KERNEL(slope_product, SlopeProduct)                             \
  KERNEL(softmax_jacobian, SoftmaxJacobian)                       \
  KERNEL(softmax_backward_tangent, SoftmaxBackwardTangent)        \
  KERNEL(log_softmax_jacobian, LogSoftmaxJacobian)                \
  KERNEL(log_softmax_backward_tangent, LogSoftmaxBackwardTangent) \
  KERNEL(transpose, Transpose)

template <class T>
struct RowKernels {
  ROW_KERNELS(POINTER_TO)
};
