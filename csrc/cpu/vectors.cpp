// CPU vector kernels, compiled once per instruction level (LEVEL). Everything but the table has internal linkage, so
// that no function compiled for a newer machine is shared with an older one.
#include "vectors.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "level.h"

namespace {

constexpr int64_t CHUNK = 8192;  // numbers whose products are summed before the sum joins the others
constexpr int LANES = 16;        // independent accumulators: wide enough for two AVX-512 registers of doubles

int64_t chunks_of(int64_t n) { return (n + CHUNK - 1) / CHUNK; }

// A float product is exact in double, so only the additions round.
template <class T>
double dot(const T* __restrict__ a, const T* __restrict__ b, int64_t n) {
  double lane[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int j = 0; j < LANES; ++j) lane[j] += double(a[i + j]) * double(b[i + j]);
  double sum = 0;
  for (; i < n; ++i) sum += double(a[i]) * double(b[i]);
  for (int j = 0; j < LANES; ++j) sum += lane[j];
  return sum;
}

// Pairs a row chunk of V with all rows of W while the chunk is in cache: V is read once, W's chunk stays in L2.
template <class T>
void gram(const T* V, int64_t k, const T* W, int64_t m, int64_t n, double* out, int threads) {
  const int64_t chunks = chunks_of(n);
  const bool symmetric = V == W && k == m;
  std::vector<double> partial(chunks * k * m);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && n * (k + m) > CHUNK)
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t at = c * CHUNK, size = std::min(CHUNK, n - at);
    for (int64_t i = 0; i < k; ++i)
      for (int64_t j = symmetric ? i : 0; j < m; ++j)
        partial[(c * k + i) * m + j] = dot(V + i * n + at, W + j * n + at, size);
  }
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = symmetric ? i : 0; j < m; ++j) {
      double sum = 0;
      for (int64_t c = 0; c < chunks; ++c) sum += partial[(c * k + i) * m + j];
      out[i * m + j] = sum;
      if (symmetric) out[j * m + i] = sum;
    }
}

// The residual is summed from h - theta v itself: |h|^2 - theta^2 would lose half its digits near an eigenvector.
template <class T>
void power_step(const T* V, const T* H, int64_t k, int64_t n, double* theta, double* residual, T* out, int threads) {
  const int64_t chunks = chunks_of(n);
  std::vector<double> first(2 * chunks * k), second(chunks * k), scale(k);
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (threads > 1 && n * k > CHUNK)
  for (int64_t i = 0; i < k; ++i)
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t at = i * n + c * CHUNK, size = std::min(CHUNK, n - c * CHUNK);
      first[2 * (i * chunks + c)] = dot(V + at, H + at, size);
      first[2 * (i * chunks + c) + 1] = dot(H + at, H + at, size);
    }
  for (int64_t i = 0; i < k; ++i) {
    double a = 0, b = 0;
    for (int64_t c = 0; c < chunks; ++c) a += first[2 * (i * chunks + c)], b += first[2 * (i * chunks + c) + 1];
    theta[i] = a;
    scale[i] = b > 0 ? 1 / std::sqrt(b) : 0;
  }
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (threads > 1 && n * k > CHUNK)
  for (int64_t i = 0; i < k; ++i)
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t size = std::min(CHUNK, n - c * CHUNK), at = i * n + c * CHUNK;
      const T* __restrict__ v = V + at;
      const T* __restrict__ h = H + at;
      T* __restrict__ o = out + at;
      const double t = theta[i], s = scale[i];
      double lane[LANES] = {}, sum = 0;
      int64_t x = 0;
      for (; x + LANES <= size; x += LANES)
        for (int j = 0; j < LANES; ++j) {
          const double hx = h[x + j], r = hx - t * double(v[x + j]);
          lane[j] += r * r;
          o[x + j] = T(hx * s);
        }
      for (; x < size; ++x) {
        const double hx = h[x], r = hx - t * double(v[x]);
        sum += r * r;
        o[x] = T(hx * s);
      }
      for (int j = 0; j < LANES; ++j) sum += lane[j];
      second[i * chunks + c] = sum;
    }
  for (int64_t i = 0; i < k; ++i) {
    double sum = 0;
    for (int64_t c = 0; c < chunks; ++c) sum += second[i * chunks + c];
    residual[i] = std::sqrt(sum);
  }
}

// A stretch of columns at a time, short enough that its rows of V stay in L1 while all rows of the result are formed.
template <class T>
void combine(const double* C, int64_t m, int64_t k, const T* V, int64_t n, T* out, int threads) {
  constexpr int64_t STRETCH = 512;
  const int64_t stretches = (n + STRETCH - 1) / STRETCH;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && n * (k + m) > CHUNK)
  for (int64_t c = 0; c < stretches; ++c) {
    const int64_t at = c * STRETCH, size = std::min(STRETCH, n - at);
    double sum[STRETCH];
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t x = 0; x < size; ++x) sum[x] = C[i * k] * double(V[at + x]);
      for (int64_t j = 1; j < k; ++j) {
        const T* __restrict__ v = V + j * n + at;
        const double w = C[i * k + j];
        for (int64_t x = 0; x < size; ++x) sum[x] += w * double(v[x]);
      }
      T* __restrict__ o = out + i * n + at;
      for (int64_t x = 0; x < size; ++x) o[x] = T(sum[x]);
    }
  }
}

template <class T>
void scale(const T* V, int64_t k, int64_t n, const T* d, T* out, int threads) {
  const int64_t chunks = chunks_of(n);
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (threads > 1 && n * k > CHUNK)
  for (int64_t c = 0; c < chunks; ++c)
    for (int64_t i = 0; i < k; ++i) {
      const int64_t at = c * CHUNK, size = std::min(CHUNK, n - at);
      const T* v = V + i * n + at;
      T* o = out + i * n + at;
#pragma omp simd
      for (int64_t x = 0; x < size; ++x) o[x] = v[x] * d[at + x];
    }
}

template <class T>
void inv_sqrt_adam(const T* v, int64_t n, double correction, double eps, double factor, T* out, int threads) {
#pragma omp parallel for simd schedule(static) num_threads(threads) if (threads > 1 && n > CHUNK)
  for (int64_t i = 0; i < n; ++i)
    out[i] = T(1 / std::sqrt(factor * (std::sqrt(double(v[i]) / correction) + eps)));
}

template <class T>
constexpr VectorKernels<T> table() {
  return {gram<T>, power_step<T>, combine<T>, scale<T>, inv_sqrt_adam<T>};
}

}  // namespace

extern const KernelTable JOIN(kernels_, LEVEL);
const KernelTable JOIN(kernels_, LEVEL) = {TEXT(LEVEL), table<float>(), table<double>()};
