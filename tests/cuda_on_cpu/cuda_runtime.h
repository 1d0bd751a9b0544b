// As much of CUDA as csrc/cuda uses, on the CPU: stands before the real header in the include path, so that the very
// source of the kernels computes numbers without a GPU. Blocks run one after another, the threads of a block as fibers
// that switch at barriers and shuffles only. The order of both can be reversed: code without races gives the same bits.
// It says nothing about speed, the memory model, or the rounding of the GPU's own functions.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static  // one block at a time

using std::sqrt;
inline double rsqrt(double x) { return 1 / std::sqrt(x); }

struct alignas(16) int4 {
  int x, y, z, w;
};
inline void __stwb(int4* address, int4 value) { *address = value; }

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 gridDim, blockIdx, threadIdx;

namespace emulator {

struct Barrier {
  int size, arrived = 0;
  unsigned generation = 0;
};

constexpr int WARP = 32;
constexpr size_t STACK = 1 << 16;

inline bool reversed = false;
inline std::function<void()> body;
inline std::vector<std::vector<char>> stacks;
inline std::vector<ucontext_t> fibers;
inline std::vector<char> done;
inline ucontext_t scheduler;
inline Barrier block_barrier;
inline std::vector<Barrier> warp_barriers;
inline double exchanged[2][1024];

inline void wait(Barrier& barrier) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.generation;
  } else {
    const unsigned me = threadIdx.x;
    while (barrier.generation == generation) swapcontext(&fibers[me], &scheduler);
  }
}

inline void run_fiber() {
  const unsigned me = threadIdx.x;
  body();
  done[me] = true;
}

inline void run_block(unsigned threads) {
  stacks.resize(threads, std::vector<char>(STACK));
  fibers.resize(threads);
  done.assign(threads, false);
  block_barrier = {int(threads)};
  warp_barriers.assign(threads / WARP, {WARP});
  for (unsigned t = 0; t < threads; ++t) {
    getcontext(&fibers[t]);
    fibers[t].uc_stack.ss_sp = stacks[t].data();
    fibers[t].uc_stack.ss_size = STACK;
    fibers[t].uc_link = &scheduler;
    makecontext(&fibers[t], run_fiber, 0);
  }
  for (bool busy = true; busy;) {
    busy = false;
    for (unsigned i = 0; i < threads; ++i) {
      const unsigned t = reversed ? threads - 1 - i : i;
      if (done[t]) continue;
      threadIdx.x = t;
      swapcontext(&scheduler, &fibers[t]);
      busy = true;
    }
  }
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::block_barrier); }

inline double __shfl_xor_sync(unsigned, double value, int lanes) {
  const unsigned me = threadIdx.x;
  emulator::Barrier& warp = emulator::warp_barriers[me / emulator::WARP];
  double* slots = emulator::exchanged[warp.generation % 2];
  slots[me] = value;
  emulator::wait(warp);
  return slots[me ^ lanes];
}

enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  struct CUstream_st* stream;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  if (config->gridDim.x < 1 || config->gridDim.x > 0x7fffffffu) return cudaErrorInvalidConfiguration;
  gridDim = config->gridDim;
  emulator::body = [&] { kernel(arguments...); };
  for (unsigned b = 0; b < gridDim.x; ++b) {
    blockIdx.x = emulator::reversed ? gridDim.x - 1 - b : b;
    emulator::run_block(config->blockDim.x);
  }
  return cudaSuccess;
}
