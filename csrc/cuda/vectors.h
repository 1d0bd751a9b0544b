// The kernels of ../vectors.h on a CUDA stream. Addresses are device addresses; each function enqueues its work and
// returns, allocates nothing and waits for nothing, so that it can be captured in a CUDA graph. Sums are double, split
// by n, k and m alone: the same bits in every run and on every chip. A refused launch throws std::runtime_error.
#pragma once
#include "../vectors.h"

struct CUstream_st;

namespace cuda {

using Stream = CUstream_st*;

// Why no kernel can run on this machine, for instance an old driver; nullptr if one can.
const char* problem();

// After its arguments a kernel takes a workspace and a stream.
template <class T>
using Kernels = VectorKernels<T, double*, Stream>;

// How many doubles the workspace of the kernel of the same name must hold, from that kernel's integers in their order.
// A kernel that is not listed reads no workspace.
#define WORKSPACES(KERNEL)                      \
  KERNEL(gram, int64_t k, int64_t m, int64_t n) \
  KERNEL(power_step, int64_t k, int64_t n)

template <class T>
struct Workspaces {
#define POINTER(name, ...) int64_t (*name)(__VA_ARGS__);
  WORKSPACES(POINTER)
#undef POINTER
};

extern const Table<Kernels> kernels;
extern const Table<Workspaces> workspaces;

}  // namespace cuda
