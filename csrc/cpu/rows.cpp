// CPU kernels that pass over memory once: pointwise products, and softmax's derivatives row by row.
#include "rows.h"

#include <algorithm>

#include "level.h"
#include "parallel.h"

namespace {

constexpr int LANES = 16;
constexpr int64_t SMALL = 32768;    // numbers below which waking the other threads costs more than it saves
constexpr int64_t STRETCH = 4096;   // numbers of the primal that stay in L1 while all k tangents pass

template <class T>
void slope_product(const T* slope, const T* d, const T* curvature, const T* dz, int64_t k, int64_t n, T* out,
                   int threads) {
  const int64_t stretches = (n + STRETCH - 1) / STRETCH;
  each(stretches, k * n > SMALL ? threads : 1, [&](int64_t s) {
    const int64_t from = s * STRETCH, size = std::min(STRETCH, n - from);
    for (int64_t i = 0; i < k; ++i) {
      const T* __restrict__ a = slope + from;
      const T* __restrict__ x = d + i * n + from;
      T* __restrict__ y = out + i * n + from;
      if (curvature) {
        const T* __restrict__ c = curvature + from;
        const T* __restrict__ z = dz + i * n + from;
        for (int64_t j = 0; j < size; ++j) y[j] = a[j] * x[j] + c[j] * z[j];
      } else {
        for (int64_t j = 0; j < size; ++j) y[j] = a[j] * x[j];
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
void softmax_jacobian(const T* p, const T* u, const T* weight, int64_t k, int64_t rows, int64_t C, T* out, T* mean,
                      int threads) {
  each(rows, k * rows * C > SMALL ? threads : 1, [&](int64_t r) {
    for (int64_t i = 0; i < k; ++i) {
      const T* __restrict__ pr = p + r * C;
      const T* __restrict__ ur = u + (i * rows + r) * C;
      T* __restrict__ o = out + (i * rows + r) * C;
      const T m = dot(pr, ur, C), w = weight ? weight[r] : T(1);
      mean[i * rows + r] = m;
      for (int64_t c = 0; c < C; ++c) o[c] = w * pr[c] * (ur[c] - m);
    }
  });
}

template <class T>
void softmax_backward_tangent(const T* p, const T* dp, const T* inner, const T* dg, int64_t k, int64_t rows, int64_t C,
                              T* out, int threads) {
  each(rows, k * rows * C > SMALL ? threads : 1, [&](int64_t r) {
    for (int64_t i = 0; i < k; ++i) {
      const int64_t at = (i * rows + r) * C;
      const T* __restrict__ pr = p + r * C;
      const T* __restrict__ in = inner + r * C;
      const T* __restrict__ dpr = dp + at;
      const T* __restrict__ g = dg + at;
      T* __restrict__ o = out + at;
      const T shift = dot(pr, g, C) + dot(dpr, in, C);
      for (int64_t c = 0; c < C; ++c) o[c] = pr[c] * (g[c] - shift) + dpr[c] * in[c];
    }
  });
}

template <class T>
constexpr RowKernels<T> table() {
  return {slope_product<T>, softmax_jacobian<T>, softmax_backward_tangent<T>};
}

}  // namespace

extern const RowTable JOIN(rows_, LEVEL);
const RowTable JOIN(rows_, LEVEL) = {table<float>(), table<double>()};
