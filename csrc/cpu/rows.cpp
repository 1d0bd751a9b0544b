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

// The sum of term(0) to term(n - 1).
template <class T, class Term>
T sum_of(int64_t n, const Term& term) {
  T lane[LANES] = {}, sum = 0;
  int64_t j = 0;
  for (; j + LANES <= n; j += LANES)
    for (int l = 0; l < LANES; ++l) lane[l] += term(j + l);
  for (; j < n; ++j) sum += term(j);
  for (int l = 0; l < LANES; ++l) sum += lane[l];
  return sum;
}

template <class T>
T dot(const T* __restrict__ a, const T* __restrict__ b, int64_t n) {
  return sum_of<T>(n, [&](int64_t j) { return a[j] * b[j]; });
}

template <class T>
T sum(const T* __restrict__ a, int64_t n) {
  return sum_of<T>(n, [&](int64_t j) { return a[j]; });
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
void log_softmax_jacobian(const LogSoftmaxJacobian<T>& a, int threads) {
  each(a.rows, a.k * a.rows * a.C > SMALL ? threads : 1, [&](int64_t row) {
    for (int64_t i = 0; i < a.k; ++i) {
      const int64_t at = (i * a.rows + row) * a.C, C = a.C;
      const T* __restrict__ u = a.u + at;
      T* __restrict__ out = a.out + at;
      const T mean = dot(a.p + row * C, u, C);
      for (int64_t c = 0; c < C; ++c) out[c] = u[c] - mean;
    }
  });
}

template <class T>
void log_softmax_backward_tangent(const LogSoftmaxBackwardTangent<T>& a, int threads) {
  each(a.rows, a.k * a.rows * a.C > SMALL ? threads : 1, [&](int64_t row) {
    for (int64_t i = 0; i < a.k; ++i) {
      const int64_t at = (i * a.rows + row) * a.C, C = a.C;
      const T* __restrict__ p = a.p + row * C;
      const T* __restrict__ dl = a.dl + at;
      const T* __restrict__ dg = a.dg + at;
      T* __restrict__ out = a.out + at;
      const T mass = sum(dg, C), total = a.total[row];
      for (int64_t c = 0; c < C; ++c) out[c] = dg[c] - p[c] * (mass + dl[c] * total);
    }
  });
}

// K columns, or k where K is 0: a constant lets the compiler turn strided reads into shuffles.
template <int K, class T>
void transpose_stretch(const T* __restrict__ columns, T* __restrict__ out, int64_t size, int64_t n, int64_t k) {
  const int64_t width = K ? K : k;
  for (int64_t i = 0; i < width; ++i)
    for (int64_t j = 0; j < size; ++j) out[i * n + j] = columns[j * width + i];
}

// A stretch of rows comes from memory once, and from the cache for each of its columns.
template <class T>
void transpose(const Transpose<T>& a, int threads) {
  const int64_t size = std::max<int64_t>(16, STRETCH / std::max<int64_t>(1, a.k)), stretches = (a.n + size - 1) / size;
  each(stretches, a.k * a.n > SMALL ? threads : 1, [&](int64_t s) {
    const int64_t from = s * size, rows = std::min(size, a.n - from);
    const T* columns = a.columns + from * a.k;
    T* out = a.out + from;
    switch (a.k) {
      case 2:
        return transpose_stretch<2>(columns, out, rows, a.n, a.k);
      case 3:
        return transpose_stretch<3>(columns, out, rows, a.n, a.k);
      case 4:
        return transpose_stretch<4>(columns, out, rows, a.n, a.k);
      default:
        return transpose_stretch<0>(columns, out, rows, a.n, a.k);
    }
  });
}

template <class T>
constexpr RowKernels<T> table() {
  return {ROW_KERNELS(VALUE_OF)};
}

}  // namespace

EXPORT_TABLE(rows_, RowKernels)
