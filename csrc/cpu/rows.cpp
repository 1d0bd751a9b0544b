// CPU kernels that pass over memory once: pointwise products, and softmax's derivatives row by row.
#include "rows.h"

#include <algorithm>

#include "level.h"
#include "parallel.h"

namespace {

// Sums under way: one alone could not be vectorised, since float additions may not change their order.
constexpr int LANES = 16;
constexpr int64_t SMALL = 32768;   // numbers below which waking the other threads costs more than it saves
constexpr int64_t STRETCH = 4096;  // numbers of the primal that stay in L1 while all k tangents pass

template <class T>
void slope_product(const SlopeProduct<T>& a, int threads) {
  const int64_t stretches = (a.n + STRETCH - 1) / STRETCH;
  each(stretches, a.k * a.n > SMALL ? threads : 1, [&](int64_t s) {
    const int64_t from = s * STRETCH, size = std::min(STRETCH, a.n - from);
    for (int64_t i = 0; i < a.k; ++i) {
      const T* __restrict__ slope = a.slope + from;
      const T* __restrict__ d = a.d + i * a.n + from;
      T* __restrict__ out = a.out + i * a.n + from;
      if (a.curvature) {
        const T* __restrict__ curvature = a.curvature + from;
        const T* __restrict__ dz = a.dz + i * a.n + from;
        for (int64_t j = 0; j < size; ++j) out[j] = slope[j] * d[j] + curvature[j] * dz[j];
      } else {
        for (int64_t j = 0; j < size; ++j) out[j] = slope[j] * d[j];
      }
    }
  });
}

template <class T>
T dot(const T* __restrict__ a, const T* __restrict__ b, int64_t n) {
  T lane[LANES] = {}, sum = 0;
  int64_t j = 0;
  for (; j + LANES <= n; j += LANES)
    for (int l = 0; l < LANES; ++l) lane[l] += a[j + l] * b[j + l];
  for (; j < n; ++j) sum += a[j] * b[j];
  for (int l = 0; l < LANES; ++l) sum += lane[l];
  return sum;
}

template <class T>
void softmax_jacobian(const SoftmaxJacobian<T>& a, int threads) {
  each(a.rows, a.k * a.rows * a.C > SMALL ? threads : 1, [&](int64_t row) {
    for (int64_t i = 0; i < a.k; ++i) {
      const int64_t at = (i * a.rows + row) * a.C, C = a.C;
      const T* __restrict__ p = a.p + row * C;
      const T* __restrict__ u = a.u + at;
      T* __restrict__ out = a.out + at;
      // Two passes over the row, the second one from the cache.
      const T mean = dot(p, u, C), weight = a.weight ? a.weight[row] : T(1);
      a.mean[i * a.rows + row] = mean;
      for (int64_t c = 0; c < C; ++c) out[c] = weight * p[c] * (u[c] - mean);
    }
  });
}

template <class T>
void softmax_backward_tangent(const SoftmaxBackwardTangent<T>& a, int threads) {
  each(a.rows, a.k * a.rows * a.C > SMALL ? threads : 1, [&](int64_t row) {
    for (int64_t i = 0; i < a.k; ++i) {
      const int64_t at = (i * a.rows + row) * a.C, C = a.C;
      const T* __restrict__ p = a.p + row * C;
      const T* __restrict__ inner = a.inner + row * C;
      const T* __restrict__ dp = a.dp + at;
      const T* __restrict__ dg = a.dg + at;
      T* __restrict__ out = a.out + at;
      const T shift = dot(p, dg, C) + dot(dp, inner, C);
      for (int64_t c = 0; c < C; ++c) out[c] = p[c] * (dg[c] - shift) + dp[c] * inner[c];
    }
  });
}

template <class T>
constexpr RowKernels<T> table() {
  return {ROW_KERNELS(VALUE_OF)};
}

}  // namespace

EXPORT_TABLE(rows_, RowKernels)
