// The kernels of ../vectors.h on a CUDA stream. Addresses are device addresses; each function enqueues its work and
// returns, allocates nothing and waits for nothing, so that it can be captured in a CUDA graph. Sums are double, split
// by n, k and m alone: the same bits in every run and on every chip. A refused launch throws std::runtime_error.
#pragma once
#include <cstdint>

struct CUstream_st;

namespace cuda {

using Stream = CUstream_st*;

// Why no kernel can run on this machine, for instance an old driver; nullptr if one can.
const char* problem();

// How many doubles the workspace of the function without the suffix must hold.
template <class T>
int64_t gram_workspace(int64_t k, int64_t m, int64_t n);
template <class T>
int64_t power_step_workspace(int64_t k, int64_t n);

template <class T>
void gram(const T* V, int64_t k, const T* W, int64_t m, int64_t n, double* out, double* workspace, Stream stream);
template <class T>
void power_step(const T* V, const T* H, int64_t k, int64_t n, double* theta, double* residual, T* out,
                double* workspace, Stream stream);
template <class T>
void combine(const double* C, int64_t m, int64_t k, const T* V, int64_t n, T* out, Stream stream);
template <class T>
void scale(const T* V, int64_t k, int64_t n, const T* d, T* out, Stream stream);
template <class T>
void inv_sqrt_adam(const T* v, int64_t n, double correction, double eps, double factor, T* out, Stream stream);

}  // namespace cuda
