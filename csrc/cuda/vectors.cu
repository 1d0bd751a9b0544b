// CUDA vector kernels. They are bound by memory: each reads a row as few times as its result allows, 16 bytes a thread.
#include "cuda/device.h"
#include "cuda/vectors.h"

namespace cuda {
namespace {

constexpr int64_t BLOCKS = 1024;       // of a sum: several for each multiprocessor, few enough to add up at once
constexpr int64_t MOST_BLOCKS = 4096;  // of a kernel without sums, whose blocks then walk on

// Into how many parts the columns are split when `rows` independent sums run at a time.
template <class T>
int64_t parts_of(int64_t rows, int64_t n) {
  const int64_t wanted = divide_up(BLOCKS, rows), steps = steps_of<T>(n);
  return steps < 1 ? 1 : wanted < steps ? wanted : steps;
}

// The K x M inner products that a block holds in registers, and how many such tiles cover a k x m result.
struct Tiles {
  int64_t K, M, down, across;
  __host__ __device__ int64_t count() const { return down * across; }
};

// For k >= m.
Tiles tiles_of(int64_t k, int64_t m) {
  const int64_t K = k <= 2 ? k : m == 1 ? 8 : 4, M = K == 8 ? 1 : K;
  return {K, M, divide_up(k, K), divide_up(m, M)};
}

// partial[tile, pair, part]. Rows past the last one repeat it: their products are computed and never read. Tiles that
// share columns are neighbours in launch order, so that they find each other's rows in the L2 cache.
template <class T, bool WIDE, int K, int M>
__global__ void __launch_bounds__(BLOCK)
    gram_partials(const T* __restrict__ V, int64_t k, const T* __restrict__ W, int64_t m, int64_t n, Tiles tiles,
                  int64_t parts, bool symmetric, double* __restrict__ partial) {
  const int64_t tile = blockIdx.x % tiles.count(), part = blockIdx.x / tiles.count();
  const int64_t top = tile / tiles.across * K, left = tile % tiles.across * M;
  if (symmetric && top > left) return;
  const T *v[K], *w[M];
#pragma unroll
  for (int i = 0; i < K; ++i) v[i] = V + (top + i < k ? top + i : k - 1) * n;
#pragma unroll
  for (int j = 0; j < M; ++j) w[j] = W + (left + j < m ? left + j : m - 1) * n;
  double sums[K * M] = {};
  for_columns<T, WIDE>(part, parts, n, [&](auto columns) {
    typename decltype(columns)::Pack a[K], b[M];
#pragma unroll
    for (int i = 0; i < K; ++i) a[i] = columns.load(v[i]);
#pragma unroll
    for (int j = 0; j < M; ++j) b[j] = columns.load(w[j]);
#pragma unroll
    for (int x = 0; x < columns.COUNT; ++x)
#pragma unroll
      for (int i = 0; i < K; ++i)
#pragma unroll
        for (int j = 0; j < M; ++j) sums[i * M + j] += double(a[i].x[x]) * double(b[j].x[x]);
  });
  const double sum = block_sums(sums);
  if (threadIdx.x < K * M) partial[(tile * K * M + threadIdx.x) * parts + part] = sum;
}

// A block for each of the k x m sums. Below the diagonal of a symmetric result it adds up the mirrored partials.
__global__ void __launch_bounds__(BLOCK)
    gram_finish(const double* __restrict__ partial, int64_t m, Tiles tiles, int64_t parts, bool symmetric,
                bool transposed, double* __restrict__ out) {
  const int64_t row = blockIdx.x / m, column = blockIdx.x % m;
  const bool mirrored = symmetric && row > column;
  const int64_t i = mirrored ? column : row, j = mirrored ? row : column;
  const int64_t tile = i / tiles.K * tiles.across + j / tiles.M, pair = i % tiles.K * tiles.M + j % tiles.M;
  const double sum = sum_parts<1>(partial + (tile * tiles.K * tiles.M + pair) * parts, parts);
  const int64_t k = gridDim.x / m;
  if (threadIdx.x == 0) out[transposed ? column * k + row : row * m + column] = sum;
}

// partial[row, 2, part]: v.h and h.h
template <class T, bool WIDE>
__global__ void __launch_bounds__(BLOCK) power_dots(const T* __restrict__ V, const T* __restrict__ H, int64_t n,
                                                    int64_t parts, double* __restrict__ partial) {
  const int64_t row = blockIdx.x / parts, part = blockIdx.x % parts;
  double sums[2] = {};
  for_columns<T, WIDE>(part, parts, n, [&](auto columns) {
    const auto v = columns.load(V + row * n), h = columns.load(H + row * n);
#pragma unroll
    for (int x = 0; x < columns.COUNT; ++x) {
      sums[0] += double(v.x[x]) * double(h.x[x]);
      sums[1] += double(h.x[x]) * double(h.x[x]);
    }
  });
  const double sum = block_sums(sums);
  if (threadIdx.x < 2) partial[(row * 2 + threadIdx.x) * parts + part] = sum;
}

__global__ void __launch_bounds__(BLOCK)
    power_dots_finish(const double* __restrict__ partial, int64_t parts, double* __restrict__ theta,
                      double* __restrict__ inverse_norm) {
  const int64_t row = blockIdx.x;
  const double sum = sum_parts<2>(partial + row * 2 * parts, parts);
  if (threadIdx.x == 0) theta[row] = sum;
  if (threadIdx.x == 1) inverse_norm[row] = sum > 0 ? 1 / sqrt(sum) : 0;
}

// The residual is summed from h - theta v itself: |h|^2 - theta^2 would lose half its digits near an eigenvector.
template <class T, bool WIDE>
__global__ void __launch_bounds__(BLOCK)
    power_residual(const T* __restrict__ V, const T* __restrict__ H, int64_t n, int64_t parts,
                   const double* __restrict__ theta, const double* __restrict__ inverse_norm, T* __restrict__ out,
                   double* __restrict__ partial) {
  const int64_t row = blockIdx.x / parts, part = blockIdx.x % parts;
  const double t = theta[row], s = inverse_norm[row];
  double sums[1] = {};
  for_columns<T, WIDE>(part, parts, n, [&](auto columns) {
    const auto v = columns.load(V + row * n), h = columns.load(H + row * n);
    typename decltype(columns)::Pack following;
#pragma unroll
    for (int x = 0; x < columns.COUNT; ++x) {
      const double rest = double(h.x[x]) - t * double(v.x[x]);
      sums[0] += rest * rest;
      following.x[x] = T(double(h.x[x]) * s);
    }
    columns.store(out + row * n, following);
  });
  const double sum = block_sums(sums);
  if (threadIdx.x == 0) partial[row * parts + part] = sum;
}

__global__ void __launch_bounds__(BLOCK)
    power_residual_finish(const double* __restrict__ partial, int64_t parts, double* __restrict__ residual) {
  const double sum = sum_parts<1>(partial + blockIdx.x * parts, parts);
  if (threadIdx.x == 0) residual[blockIdx.x] = sqrt(sum);
}

// M rows of the result at a time; the next M find the same columns of V in the cache. Four blocks a multiprocessor
// leave registers enough to have several rows of V under way.
template <class T, bool WIDE, int M>
__global__ void __launch_bounds__(BLOCK, 4) combine_rows(const double* __restrict__ C, int64_t m, int64_t k,
                                                         const T* __restrict__ V, int64_t n, T* __restrict__ out) {
  for_columns<T, WIDE>(blockIdx.x, gridDim.x, n, [&](auto columns) {
    for (int64_t top = 0; top < m; top += M) {
      double sums[M][columns.COUNT] = {};
      for (int64_t j = 0; j < k; ++j) {
        const auto v = columns.load(V + j * n);
#pragma unroll
        for (int i = 0; i < M; ++i) {
          const double c = C[(top + i < m ? top + i : m - 1) * k + j];
#pragma unroll
          for (int x = 0; x < columns.COUNT; ++x) sums[i][x] += c * double(v.x[x]);
        }
      }
#pragma unroll
      for (int i = 0; i < M; ++i) {
        typename decltype(columns)::Pack row;
#pragma unroll
        for (int x = 0; x < columns.COUNT; ++x) row.x[x] = T(sums[i][x]);
        if (top + i < m) columns.store(out + (top + i) * n, row);
      }
    }
  });
}

// out may be V, hence no __restrict__; ROWS loads are under way before the first store.
template <class T, bool WIDE, int ROWS>
__global__ void __launch_bounds__(BLOCK) scale_rows(const T* V, int64_t k, int64_t n, const T* __restrict__ d, T* out) {
  for_columns<T, WIDE>(blockIdx.x, gridDim.x, n, [&](auto columns) {
    const auto diagonal = columns.load(d);
    for (int64_t top = 0; top < k; top += ROWS) {
      typename decltype(columns)::Pack v[ROWS];
#pragma unroll
      for (int i = 0; i < ROWS; ++i)
        if (top + i < k) v[i] = columns.load(V + (top + i) * n);
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
#pragma unroll
        for (int x = 0; x < columns.COUNT; ++x) v[i].x[x] *= diagonal.x[x];
        if (top + i < k) columns.store(out + (top + i) * n, v[i]);
      }
    }
  });
}

template <class T, bool WIDE>
__global__ void __launch_bounds__(BLOCK)
    inv_sqrt_adam_rows(const T* v, int64_t n, double inverse_correction, double eps, double factor, T* out) {
  for_columns<T, WIDE>(blockIdx.x, gridDim.x, n, [&](auto columns) {
    auto moment = columns.load(v);
#pragma unroll
    for (int x = 0; x < columns.COUNT; ++x)
      moment.x[x] = T(rsqrt(factor * (sqrt(double(moment.x[x]) * inverse_correction) + eps)));
    columns.store(out, moment);
  });
}

template <class T>
int64_t blocks_of(int64_t n) {
  const int64_t steps = steps_of<T>(n);
  return steps < MOST_BLOCKS ? steps : MOST_BLOCKS;
}

template <class T, bool WIDE>
auto gram_kernel(const Tiles& tiles) {
  return tiles.K == 1   ? gram_partials<T, WIDE, 1, 1>
         : tiles.K == 2 ? gram_partials<T, WIDE, 2, 2>
         : tiles.K == 8 ? gram_partials<T, WIDE, 8, 1>
                        : gram_partials<T, WIDE, 4, 4>;
}

template <class T>
int64_t gram_workspace(int64_t k, int64_t m, int64_t n) {
  if (k < 1 || m < 1) return 0;
  const Tiles tiles = m > k ? tiles_of(m, k) : tiles_of(k, m);
  return tiles.count() * tiles.K * tiles.M * parts_of<T>(tiles.count(), n);
}

template <class T>
void gram(const T* V, int64_t k, const T* W, int64_t m, int64_t n, double* out, double* workspace, Stream stream) {
  if (k < 1 || m < 1) return;
  const bool transposed = m > k;  // the tiles are for k >= m
  if (transposed) {
    const T* other = V;
    V = W, W = other;
    const int64_t rows = k;
    k = m, m = rows;
  }
  const Tiles tiles = tiles_of(k, m);
  const int64_t parts = parts_of<T>(tiles.count(), n);
  const bool symmetric = V == W && k == m;
  const auto kernel = wide<T>(k, n, V, W) ? gram_kernel<T, true>(tiles) : gram_kernel<T, false>(tiles);
  launch("gram", kernel, tiles.count() * parts, stream, V, k, W, m, n, tiles, parts, symmetric, workspace);
  launch("gram", gram_finish, k * m, stream, workspace, m, tiles, parts, symmetric, transposed, out);
}

template <class T>
int64_t power_step_workspace(int64_t k, int64_t n) {
  return k < 1 ? 0 : 2 * k * parts_of<T>(k, n) + k;
}

template <class T>
void power_step(const T* V, const T* H, int64_t k, int64_t n, double* theta, double* residual, T* out,
                double* workspace, Stream stream) {
  if (k < 1) return;
  const int64_t parts = parts_of<T>(k, n);
  double* inverse_norm = workspace + 2 * k * parts;
  const bool aligned = wide<T>(k, n, V, H, out);
  launch("power_step", aligned ? power_dots<T, true> : power_dots<T, false>, k * parts, stream, V, H, n, parts,
         workspace);
  launch("power_step", power_dots_finish, k, stream, workspace, parts, theta, inverse_norm);
  launch("power_step", aligned ? power_residual<T, true> : power_residual<T, false>, k * parts, stream, V, H, n, parts,
         theta, inverse_norm, out, workspace);
  launch("power_step", power_residual_finish, k, stream, workspace, parts, residual);
}

template <class T>
void combine(const double* C, int64_t m, int64_t k, const T* V, int64_t n, T* out, double*, Stream stream) {
  if (m < 1 || n < 1) return;
  const bool aligned = wide<T>(k > m ? k : m, n, V, out);
  const auto kernel = m == 1 ? (aligned ? combine_rows<T, true, 1> : combine_rows<T, false, 1>)
                             : (aligned ? combine_rows<T, true, 4> : combine_rows<T, false, 4>);
  launch("combine", kernel, blocks_of<T>(n), stream, C, m, k, V, n, out);
}

template <class T>
void scale(const T* V, int64_t k, int64_t n, const T* d, T* out, double*, Stream stream) {
  if (k < 1 || n < 1) return;
  const auto kernel = wide<T>(k, n, V, d, out) ? scale_rows<T, true, 4> : scale_rows<T, false, 4>;
  launch("scale", kernel, blocks_of<T>(n), stream, V, k, n, d, out);
}

template <class T>
void inv_sqrt_adam(const T* v, int64_t n, double correction, double eps, double factor, T* out, double*,
                   Stream stream) {
  if (n < 1) return;
  const auto kernel = wide<T>(1, n, v, out) ? inv_sqrt_adam_rows<T, true> : inv_sqrt_adam_rows<T, false>;
  launch("inv_sqrt_adam", kernel, blocks_of<T>(n), stream, v, n, 1 / correction, eps, factor, out);
}

template <class T>
constexpr Kernels<T> table() {
  return {VECTOR_KERNELS(VALUE_OF)};
}

#define WORKSPACE_OF(name, ...) name##_workspace<T>,
template <class T>
constexpr Workspaces<T> workspace_table() {
  return {WORKSPACES(WORKSPACE_OF)};
}

}  // namespace

const char* problem() {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

const Table<Kernels> kernels = {table<float>(), table<double>()};
const Table<Workspaces> workspaces = {workspace_table<float>(), workspace_table<double>()};

}  // namespace cuda
