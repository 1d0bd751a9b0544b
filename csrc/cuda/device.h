// What every CUDA vector kernel is made of: a walk over columns, sums over a block, a checked launch.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cuda/vectors.h"  // Stream

namespace cuda {

constexpr int BLOCK = 256;  // threads
constexpr int WARP = 32;

// A thread takes 16 bytes of a row in one step, a block BLOCK times as many columns.
template <class T>
constexpr int PER_THREAD = 16 / sizeof(T);
template <class T>
constexpr int64_t STEP = int64_t(BLOCK) * PER_THREAD<T>;

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
int64_t steps_of(int64_t n) {
  return divide_up(n, STEP<T>);
}

// One thread's columns of one step. WIDE rows start on 16 bytes: the columns are neighbours, moved at once. Rows of any
// other alignment: the columns lie BLOCK apart, so that neighbouring threads still touch neighbouring numbers. WHOLE
// steps end before the row does; the others check every column and read zeros past the end.
template <class T, bool WIDE, bool WHOLE>
struct Columns {
  static constexpr int COUNT = PER_THREAD<T>;
  struct alignas(16) Pack {
    T x[COUNT];
  };
  int64_t first, n;

  __device__ Columns(int64_t step, int64_t n)
      : first(step * STEP<T> + int64_t(threadIdx.x) * (WIDE ? COUNT : 1)), n(n) {}

  __device__ int64_t column(int j) const { return first + j * (WIDE ? 1 : BLOCK); }

  __device__ Pack load(const T* row) const {
    Pack pack;
    if constexpr (WIDE && WHOLE) {
      pack = *reinterpret_cast<const Pack*>(row + first);
    } else {
#pragma unroll
      for (int j = 0; j < COUNT; ++j) pack.x[j] = WHOLE || column(j) < n ? row[column(j)] : T(0);
    }
    return pack;
  }

  __device__ void store(T* row, const Pack& pack) const {
    if constexpr (WIDE && WHOLE) {
      int4 bits;
      memcpy(&bits, &pack, sizeof bits);
      __stwb(reinterpret_cast<int4*>(row + first), bits);  // a plain assignment was split into single numbers
    } else {
#pragma unroll
      for (int j = 0; j < COUNT; ++j)
        if (WHOLE || column(j) < n) row[column(j)] = pack.x[j];
    }
  }
};

// Calls body with the Columns of steps first, first + stride, ... of rows of n numbers. Only the last step can reach
// past the end, so it alone pays for checks.
template <class T, bool WIDE, class Body>
__device__ void for_columns(int64_t first, int64_t stride, int64_t n, Body body) {
  const int64_t whole = n / STEP<T>;
  int64_t step = first;
  for (; step < whole; step += stride) body(Columns<T, WIDE, true>(step, n));
  if (step == whole && n % STEP<T>) body(Columns<T, WIDE, false>(step, n));
}

// Sums of COUNT values over the block, in a fixed order; thread c returns the sum of values[c]. All threads must call
// it, once in a kernel: the shared memory is not guarded against a second use.
template <int COUNT>
__device__ double block_sums(const double (&values)[COUNT]) {
  static_assert(COUNT <= BLOCK, "a thread for each sum");
  __shared__ double of_warp[BLOCK / WARP][COUNT];
#pragma unroll
  for (int c = 0; c < COUNT; ++c) {
    double sum = values[c];
#pragma unroll
    for (int lane = WARP / 2; lane > 0; lane /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lane);
    if (threadIdx.x % WARP == 0) of_warp[threadIdx.x / WARP][c] = sum;
  }
  __syncthreads();
  double sum = 0;
  if (threadIdx.x < COUNT)
    for (int w = 0; w < BLOCK / WARP; ++w) sum += of_warp[w][threadIdx.x];
  return sum;
}

// The second stage of a sum: COUNT rows of partial sums, `parts` long, that the blocks of the first stage wrote.
template <int COUNT>
__device__ double sum_parts(const double* partial, int64_t parts) {
  double values[COUNT] = {};
  for (int64_t p = threadIdx.x; p < parts; p += BLOCK)
#pragma unroll
    for (int c = 0; c < COUNT; ++c) values[c] += partial[c * parts + p];
  return block_sums(values);
}

inline void check(const char* kernel, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that the next launch does not report this error again
  throw std::runtime_error(std::string("CUDA kernel ") + kernel + " cannot run: " + cudaGetErrorString(error));
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, Stream stream, Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(BLOCK);
  config.stream = stream;
  check(name, cudaLaunchKernelEx(&config, kernel, arguments...));
}

// Whether all rows of all blocks start on 16 bytes.
template <class T, class... Blocks>
bool wide(int64_t rows, int64_t n, const Blocks*... blocks) {
  const bool rows_keep_it = rows <= 1 || n % PER_THREAD<T> == 0;
  return rows_keep_it && ((reinterpret_cast<std::uintptr_t>(blocks) % 16 == 0) && ...);
}

}  // namespace cuda
