// Norms row by row: xhat = (x - mean) r over the D numbers of each row, then y = xhat w + b by channel. The channel of
// number d of row i is (i % groups) * (D / inner) + d / inner: layer norm has groups = inner = 1, group norm its groups
// and inner = pixels, batch norm (channels as rows) groups = channels, inner = D. Formulas: rop/norm.py.
#pragma once
#include <cstdint>

enum NormMode { FIXED = 0, RMS = 1, CENTRED = 2 };  // statistics: constants; root mean square; mean and variance

struct NormShape {
  int64_t k, rows, D, groups, inner;
  int mode, threads;
};

template <class T>
struct NormKernels {
  // y = J dx w + xhat dw + db, dxhat = J dx [k, rows, D], along = mean(xhat dx) [k, rows]. Null dx, w, dw, db: absent.
  void (*tangent)(NormShape s, const T* xhat, const T* r, const T* w, const T* dx, const T* dw, const T* db, T* y,
                  T* dxhat, T* along);
  // out = J (dg w + g dw) + dJ (g w), dgw = sum dg xhat + g dxhat, dgb = sum dg. g [rows, D] belongs to the primal; a
  // null g gives the linear part alone. Null w, dw, dxhat (then along too), out, dgw, dgb: absent.
  void (*backward_tangent)(NormShape s, const T* xhat, const T* r, const T* w, const T* dw, const T* dxhat,
                           const T* along, const T* g, const T* dg, T* out, T* dgw, T* dgb);
};

struct NormTable {
  NormKernels<float> f32;
  NormKernels<double> f64;
};
