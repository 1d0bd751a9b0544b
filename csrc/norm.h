// Norms row by row: xhat = (x - mean) r over the D numbers of each row, then y = xhat w + b by channel. The channel of
// number d of row i is (i % groups) * (D / inner) + d / inner: layer norm has groups = inner = 1, group norm its groups
// and inner = pixels, batch norm (channels as rows) groups = channels, inner = D. Formulas: kernels/norm.py.
#pragma once
#include "kernel.h"

enum NormMode { FIXED, RMS, CENTRED };  // statistics: constants; root mean square; mean and variance

#define NORM_SHAPE int64_t k, rows, D, groups, inner, mode;

inline const char* norm_refusal(int64_t k, int64_t rows, int64_t D, int64_t groups, int64_t inner, int64_t mode) {
  if (k < 0 || rows < 0 || D < 0) return "a size is negative";
  if (groups < 1 || inner < 1) return "groups and inner must be at least 1";
  if (rows % groups || D % inner) return "rows are no multiple of groups, or D is none of inner";
  return mode < FIXED || mode > CENTRED ? "mode is none of the known ones" : nullptr;
}

// y = J dx w + xhat dw + db, dxhat = J dx [k, rows, D], along = mean(xhat dx) [k, rows]. Null dx, w, dw, db: absent.
template <class T>
struct NormTangent {
  FIELDS(NORM_SHAPE const T* xhat, *r, *w, *dx, *dw, *db; T * y, *dxhat, *along;)
  const char* refusal() const {
    if (const char* reason = norm_refusal(k, rows, D, groups, inner, mode)) return reason;
    if (k == 0 || rows == 0 || D == 0) return nullptr;
    return xhat && r && y && (!dx || (dxhat && along)) ? nullptr : "an operand is missing";
  }
};

// out = J (dg w + g dw) + dJ (g w), dgw = sum dg xhat + g dxhat, dgb = sum dg. g [rows, D] belongs to the primal; a
// null g gives the linear part alone. Null w, dw, dxhat (then along too), out, dgw, dgb: absent.
template <class T>
struct NormBackwardTangent {
  FIELDS(NORM_SHAPE const T* xhat, *r, *w, *dw, *dxhat, *along, *g, *dg; T * out, *dgw, *dgb;)
  const char* refusal() const {
    if (const char* reason = norm_refusal(k, rows, D, groups, inner, mode)) return reason;
    if (k == 0 || rows == 0 || D == 0) return nullptr;
    return xhat && r && dg && (!dxhat || along) ? nullptr : "an operand is missing";
  }
};

#define NORM_KERNELS(KERNEL)        \
  KERNEL(norm_tangent, NormTangent) \
  KERNEL(norm_backward_tangent, NormBackwardTangent)

template <class T>
struct NormKernels {
  NORM_KERNELS(POINTER_TO)
};
