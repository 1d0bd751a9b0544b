// CPU vector kernels, compiled once per instruction level (LEVEL). Everything but the table has internal linkage, so
// that no function compiled for a newer machine is shared with an older one.
#include "vectors.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>
#ifdef __SSE2__
#include <immintrin.h>
#endif

#include "level.h"
#include "parallel.h"

namespace {

constexpr int64_t CHUNK = 8192;    // numbers whose products are summed before the sum joins the others
constexpr int64_t STRETCH = 1024;  // numbers of each row that stay in L1 while all rows of a result are formed
constexpr int SUMS = 8;            // registers of sums under way: as many additions as two units have in flight

int64_t chunks_of(int64_t n) { return (n + CHUNK - 1) / CHUNK; }

constexpr int64_t LINE = 64;            // bytes that a core moves at a time
constexpr int64_t STREAMED = 16 << 20;  // bytes of a result that no cache keeps until it is read

// Whether a result should go past the caches: reading its lines before they are overwritten costs a third of a copy.
template <class T>
bool streamed(const T* out, int64_t rows, int64_t n) {
  return rows * n * int64_t(sizeof(T)) >= STREAMED && reinterpret_cast<std::uintptr_t>(out) % LINE == 0 &&
         (rows == 1 || n * int64_t(sizeof(T)) % LINE == 0);
}

// Writes whole lines; past the caches if `past`, which needs a target that starts on a line.
template <class T, int COUNT>
void put(T* to, const T (&from)[COUNT], bool past) {
  static_assert(COUNT * sizeof(T) % LINE == 0, "whole lines");
  // in the pieces that they were computed in, or the loads would wait for the stores
#if defined(__AVX512F__)
  if (past) {
    for (unsigned i = 0; i < sizeof from / 32; ++i)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to) + i,
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from) + i));
    return;
  }
#elif defined(__SSE2__)
  if (past) {
    for (unsigned i = 0; i < sizeof from / 16; ++i)
      _mm_stream_si128(reinterpret_cast<__m128i*>(to) + i, _mm_loadu_si128(reinterpret_cast<const __m128i*>(from) + i));
    return;
  }
#endif
  std::memcpy(to, from, sizeof from);
}

// A register of doubles. TALL x WIDE sums and the rows that feed them fit into the level's registers.
#if defined(__AVX512F__)
constexpr int WIDTH = 8, TALL = 4, WIDE = 4;
#elif defined(__AVX__)
constexpr int WIDTH = 4, TALL = 4, WIDE = 2;
#else
constexpr int WIDTH = 2, TALL = 4, WIDE = 2;
#endif
typedef double Doubles __attribute__((vector_size(WIDTH * sizeof(double))));

Doubles load(const double* x) {
  Doubles wide;
  std::memcpy(&wide, x, sizeof wide);
  return wide;
}

// By name: GCC 12 converts a vector in halves, one of them through the stack, which takes three times as long.
Doubles load(const float* x) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(x));  // the form without a mask warns in GCC 12
#elif defined(__AVX__)
  return _mm256_cvtps_pd(_mm_loadu_ps(x));
#elif defined(__SSE2__)
  return _mm_cvtps_pd(_mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x))));
#else
  return Doubles{x[0], x[1]};
#endif
}

void store(double* to, Doubles x) { std::memcpy(to, &x, sizeof x); }

void store(float* to, Doubles x) {
#if defined(__AVX512F__)
  _mm256_storeu_ps(to, _mm512_maskz_cvtpd_ps(0xff, x));
#elif defined(__AVX__)
  _mm_storeu_ps(to, _mm256_cvtpd_ps(x));
#elif defined(__SSE2__)
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_castps_si128(_mm_cvtpd_ps(x)));
#else
  for (int l = 0; l < WIDTH; ++l) to[l] = float(x[l]);
#endif
}

double total(Doubles x) {
  double sum = 0;
  for (int l = 0; l < WIDTH; ++l) sum += x[l];
  return sum;
}

// A float product is exact in double, so only the additions round.
template <class T>
double dot(const T* a, const T* b, int64_t n) {
  Doubles sum[SUMS] = {};
  int64_t x = 0;
  for (; x + SUMS * WIDTH <= n; x += SUMS * WIDTH)
    for (int j = 0; j < SUMS; ++j) sum[j] += load(a + x + j * WIDTH) * load(b + x + j * WIDTH);
  double rest = 0;
  for (; x < n; ++x) rest += double(a[x]) * double(b[x]);
  for (int j = 0; j < SUMS; ++j) rest += total(sum[j]);
  return rest;
}

// All products of K rows with M others: each number is converted once for K or M products, which stay in registers.
template <int K, int M, class T>
void products(const T* v, const T* w, int64_t n, int64_t size, double* out, int64_t m) {
  Doubles sum[K][M] = {};
  int64_t x = 0;
  for (; x + WIDTH <= size; x += WIDTH) {
    Doubles b[M];
    for (int j = 0; j < M; ++j) b[j] = load(w + j * n + x);
    for (int i = 0; i < K; ++i) {
      const Doubles a = load(v + i * n + x);
      for (int j = 0; j < M; ++j) sum[i][j] += a * b[j];
    }
  }
  for (int i = 0; i < K; ++i)
    for (int j = 0; j < M; ++j) {
      double rest = 0;
      for (int64_t y = x; y < size; ++y) rest += double(v[i * n + y]) * double(w[j * n + y]);
      out[i * m + j] = total(sum[i][j]) + rest;
    }
}

template <int K, class T>
void products_of_rows(const T* v, const T* w, int64_t n, int64_t size, double* out, int64_t m, int64_t columns) {
  if (columns == 1) return products<K, 1>(v, w, n, size, out, m);
  if (columns == 2) return products<K, 2>(v, w, n, size, out, m);
  if constexpr (WIDE > 2) {
    if (columns == 3) return products<K, 3>(v, w, n, size, out, m);
    products<K, WIDE>(v, w, n, size, out, m);
  }
}

// A chunk of all rows stays in L2 while its tiles are formed, so that memory is read once.
//
// Not kept, at eight rows from memory, in the speed of a copy (Zen 3, one thread; two blocks here 0.75 to 0.79): 4 x 2
// tiles over 512 to 8192 columns at a time 0.66 to 0.76, with prefetches 0.69; rows converted once into a buffer in L1
// 0.32 to 0.42; the next chunk prefetched during this one's tiles 0.52 to 0.57. 3 x 3 tiles are somewhat ahead there,
// equal in cache and slower at four rows. On Zen 4, 256 to 2048 columns at a time 0.45 to 0.50 instead of 0.53, with
// prefetches 0.35 to 0.40. Sums of float products in float were not tried: they round a constant vector's sums all in
// one direction.
template <class T>
void gram(const T* V, int64_t k, const T* W, int64_t m, int64_t n, double* out, int threads) {
  const int64_t chunks = chunks_of(n);
  const bool symmetric = V == W && k == m;
  std::vector<double> partial(chunks * k * m);
  each(chunks, n * (k + m) > CHUNK ? threads : 1, [&](int64_t c) {
    const int64_t at = c * CHUNK, size = std::min(CHUNK, n - at);
    if (k == 1 && m == 1) {
      partial[c] = dot(V + at, W + at, size);  // more sums under way than one tile has
      return;
    }
    for (int64_t i = 0; i < k; i += TALL)
      for (int64_t j = symmetric ? i : 0; j < m; j += WIDE) {
        const int64_t rows = std::min<int64_t>(TALL, k - i), columns = std::min<int64_t>(WIDE, m - j);
        const T *v = V + i * n + at, *w = W + j * n + at;
        double* to = &partial[(c * k + i) * m + j];
        if (rows == 1) products_of_rows<1>(v, w, n, size, to, m, columns);
        if (rows == 2) products_of_rows<2>(v, w, n, size, to, m, columns);
        if (rows == 3) products_of_rows<3>(v, w, n, size, to, m, columns);
        if (rows == TALL) products_of_rows<TALL>(v, w, n, size, to, m, columns);
      }
  });
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = symmetric ? i : 0; j < m; ++j) {
      double sum = 0;
      for (int64_t c = 0; c < chunks; ++c) sum += partial[(c * k + i) * m + j];
      out[i * m + j] = sum;
      if (symmetric) out[j * m + i] = sum;
    }
}

// The residual is summed from h - theta v itself: |h|^2 - theta^2 would lose half its digits near an eigenvector.
// Not kept: stores past the caches, at eight rows 0.77 of a copy's speed instead of 0.91 (Zen 4, one thread).
template <class T>
void power_step(const T* V, const T* H, int64_t k, int64_t n, double* theta, double* residual, T* out, int threads) {
  constexpr int PARTS = 4;
  const int64_t chunks = chunks_of(n);
  std::vector<double> first(2 * chunks * k), second(chunks * k), scale(k);
  const int wanted = n * k > CHUNK ? threads : 1;
  each(k * chunks, wanted, [&](int64_t job) {
    const int64_t i = job / chunks, c = job % chunks, at = i * n + c * CHUNK, size = std::min(CHUNK, n - c * CHUNK);
    first[2 * job] = dot(V + at, H + at, size);
    first[2 * job + 1] = dot(H + at, H + at, size);
  });
  for (int64_t i = 0; i < k; ++i) {
    double a = 0, b = 0;
    for (int64_t c = 0; c < chunks; ++c) a += first[2 * (i * chunks + c)], b += first[2 * (i * chunks + c) + 1];
    theta[i] = a;
    scale[i] = b > 0 ? 1 / std::sqrt(b) : 0;
  }
  each(k * chunks, wanted, [&](int64_t job) {
    const int64_t i = job / chunks, c = job % chunks, at = i * n + c * CHUNK, size = std::min(CHUNK, n - c * CHUNK);
    const T* __restrict__ v = V + at;
    const T* __restrict__ h = H + at;
    T* __restrict__ o = out + at;
    const double t = theta[i], s = scale[i];
    Doubles squares[PARTS] = {};
    double sum = 0;
    int64_t x = 0;
    for (; x + PARTS * WIDTH <= size; x += PARTS * WIDTH)
      for (int j = 0; j < PARTS; ++j) {
        const Doubles hx = load(h + x + j * WIDTH), r = hx - t * load(v + x + j * WIDTH);
        squares[j] += r * r;
        store(o + x + j * WIDTH, hx * s);
      }
    for (; x < size; ++x) {
      const double hx = h[x], r = hx - t * double(v[x]);
      sum += r * r;
      o[x] = T(hx * s);
    }
    for (int j = 0; j < PARTS; ++j) sum += total(squares[j]);
    second[job] = sum;
  });
  for (int64_t i = 0; i < k; ++i) {
    double sum = 0;
    for (int64_t c = 0; c < chunks; ++c) sum += second[i * chunks + c];
    residual[i] = std::sqrt(sum);
  }
}

// ROWS rows of the result at a time, in registers: a row of V is converted once for all of them.
// Not kept, at eight rows (here 0.74 to 0.77 of a copy's speed; Zen 3, one thread): four rows of half a line at a time
// 0.50, pieces of 512 columns 0.73 to 0.83.
template <int ROWS, class T>
void combined(const double* C, int64_t k, const T* V, int64_t n, int64_t size, T* out, bool past) {
  constexpr int COUNT = LINE / sizeof(T), PARTS = COUNT / WIDTH;
  int64_t x = 0;
  for (; x + COUNT <= size; x += COUNT) {
    Doubles sum[ROWS][PARTS] = {};
    for (int64_t j = 0; j < k; ++j)
      for (int p = 0; p < PARTS; ++p) {
        const Doubles v = load(V + j * n + x + p * WIDTH);
        for (int i = 0; i < ROWS; ++i) sum[i][p] += C[i * k + j] * v;
      }
    for (int i = 0; i < ROWS; ++i) {
      T line[COUNT];
      for (int p = 0; p < PARTS; ++p) store(line + p * WIDTH, sum[i][p]);
      put(out + i * n + x, line, past);
    }
  }
  for (; x < size; ++x)
    for (int i = 0; i < ROWS; ++i) {
      double sum = 0;
      for (int64_t j = 0; j < k; ++j) sum += C[i * k + j] * double(V[j * n + x]);
      out[i * n + x] = T(sum);
    }
}

template <class T>
void combine(const double* C, int64_t m, int64_t k, const T* V, int64_t n, T* out, int threads) {
  constexpr int MOST = WIDTH == 8 ? 8 : WIDTH == 4 ? 2 : 1;
  const int64_t stretches = (n + STRETCH - 1) / STRETCH;
  const bool past = streamed(out, m, n);
  each(stretches, n * (k + m) > CHUNK ? threads : 1, [&](int64_t c) {
    const int64_t at = c * STRETCH, size = std::min(STRETCH, n - at);
    int64_t i = 0;
    for (; i + MOST <= m; i += MOST) combined<MOST>(C + i * k, k, V + at, n, size, out + i * n + at, past);
    for (; i < m; ++i) combined<1>(C + i * k, k, V + at, n, size, out + i * n + at, past);
  });
}

// The diagonal's piece stays in L1 for all rows; longer ones cost a quarter of the speed at eight rows (32 KiB: 0.68
// of a copy's instead of 0.9; Zen 4, one thread).
template <class T>
void scale(const T* V, int64_t k, int64_t n, const T* d, T* out, int threads) {
  constexpr int COUNT = LINE / sizeof(T);
  const int64_t stretches = (n + STRETCH - 1) / STRETCH;
  const bool past = streamed(out, k, n);
  each(stretches * k, n * k > CHUNK ? threads : 1, [&](int64_t job) {
    const int64_t at = job / k * STRETCH, i = job % k, size = std::min(STRETCH, n - at);
    const T *v = V + i * n + at, *diagonal = d + at;
    T* o = out + i * n + at;
    int64_t x = 0;
    for (; x + COUNT <= size; x += COUNT) {
      T line[COUNT];
#pragma omp simd  // GCC 12 else unrolls it first, and vectorises half of it: 1.8 times torch's time in cache, not 1.1
      for (int j = 0; j < COUNT; ++j) line[j] = v[x + j] * diagonal[x + j];
      put(o + x, line, past);
    }
    for (; x < size; ++x) o[x] = v[x] * diagonal[x];
  });
}

// In T itself: two roots and a division of doubles take longer than the memory. Rounds five times, to below 3 ulp.
template <class T>
void inv_sqrt_adam(const T* v, int64_t n, double correction, double eps, double factor, T* out, int threads) {
  constexpr int COUNT = LINE / sizeof(T);
  const T c = T(1 / correction), e = T(eps), f = T(factor);
  const bool past = streamed(out, 1, n);
  const int64_t lines = n / COUNT;
  each(lines, n > CHUNK ? threads : 1, [&](int64_t i) {
    T line[COUNT];
    for (int j = 0; j < COUNT; ++j) line[j] = 1 / std::sqrt(f * (std::sqrt(v[i * COUNT + j] * c) + e));
    put(out + i * COUNT, line, past);
  });
  for (int64_t i = lines * COUNT; i < n; ++i) out[i] = 1 / std::sqrt(f * (std::sqrt(v[i] * c) + e));
}

template <class T>
constexpr CpuVectorKernels<T> table() {
  return {VECTOR_KERNELS(VALUE_OF)};
}

}  // namespace

EXPORT_TABLE(vectors_, CpuVectorKernels)
