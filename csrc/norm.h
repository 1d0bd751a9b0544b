// Norms row by row: xhat = (x - mean) r over the D numbers of each row, then y = xhat w + b by channel. The channel of
// number d of row i is (i % groups) * (D / inner) + d / inner: layer norm has groups = inner = 1, group norm its groups
// and inner = pixels, batch norm (channels as rows) groups = channels, inner = D. Formulas: kernels/norm.py.
#pragma once
#include "kernel.h"

enum NormMode { FIXED, RMS, CENTRED };  // statistics: constants; root mean square; mean and variance

#define NORM_SHAPE int64_t k, rows, D, groups, inner, mode;

// y = J dx w + xhat dw + db, dxhat = J dx [k, rows, D], along = mean(xhat dx) [k, rows]. Null dx, w, dw, db: absent.
template <class T>
struct NormTangent {
  FIELDS(NORM_SHAPE const T* xhat, *r, *w, *dx, *dw, *db; T * y, *dxhat, *along;)
};

// out = J (dg w + g dw) + dJ (g w), dgw = sum dg xhat + g dxhat, dgb = sum dg. g [rows, D] belongs to the primal; a
// null g gives the linear part alone. Null w, dw, dxhat (then along too), out, dgw, dgb: absent.
template <class T>
struct NormBackwardTangent {
  FIELDS(NORM_SHAPE const T* xhat, *r, *w, *dw, *dxhat, *along, *g, *dg; T * out, *dgw, *dgb;)
};

#define NORM_KERNELS(KERNEL)        \
  KERNEL(norm_tangent, NormTangent) \
  KERNEL(norm_backward_tangent, NormBackwardTangent)

template <class T>
struct NormKernels {
  NORM_KERNELS(POINTER_TO)
};
