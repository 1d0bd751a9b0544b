// Slope and curvature of smooth activations, one pass each. Formulas: csrc/cpu/activation.cpp.
#pragma once
#include <cstdint>

enum Activation { GELU = 0, GELU_TANH = 1, SILU = 2 };  // kernels/cpu/native.py counts the same way

template <class T>
struct ActivationKernels {
  // out = f'(x) for x, y = f(x), out [n]
  void (*slope)(int activation, const T* x, const T* y, int64_t n, T* out, int threads);
  // out = g f''(x) for x, g, out [n]
  void (*curvature)(int activation, const T* x, const T* g, int64_t n, T* out, int threads);
};

struct ActivationTable {
  ActivationKernels<float> f32;
  ActivationKernels<double> f64;
};
