// Slope and curvature of smooth activations, one pass each. Formulas: csrc/cpu/activation.cpp.
#pragma once
#include "kernel.h"

// By the names that torch gives them; Python takes their values from the compiled module.
#define ACTIVATIONS(ACTIVATION) \
  ACTIVATION(gelu)              \
  ACTIVATION(gelu_tanh)         \
  ACTIVATION(silu)              \
  ACTIVATION(tanh)              \
  ACTIVATION(sigmoid)           \
  ACTIVATION(softplus)          \
  ACTIVATION(mish)

#define ENUMERATOR(name) name,
enum class Activation : int64_t { ACTIVATIONS(ENUMERATOR) };
#undef ENUMERATOR

#define COUNT(name) +1
constexpr int64_t ACTIVATION_COUNT = 0 ACTIVATIONS(COUNT);
#undef COUNT

inline const char* activation_refusal(int64_t activation, int64_t n, bool complete) {
  if (activation < 0 || activation >= ACTIVATION_COUNT) return "activation is none of the known ones";
  if (n < 0) return "a size is negative";
  return n > 0 && !complete ? "an operand is missing" : nullptr;
}

// out = f'(x) for x, y = f(x), out [n]
template <class T>
struct ActivationSlope {
  FIELDS(int64_t activation, n; const T* x, *y; T * out;)
  const char* refusal() const { return activation_refusal(activation, n, x && y && out); }
};

// out = g f''(x) for x, g, out [n]
template <class T>
struct ActivationCurvature {
  FIELDS(int64_t activation, n; const T* x, *g; T * out;)
  const char* refusal() const { return activation_refusal(activation, n, x && g && out); }
};

#define ACTIVATION_KERNELS(KERNEL)          \
  KERNEL(activation_slope, ActivationSlope) \
  KERNEL(activation_curvature, ActivationCurvature)

template <class T>
struct ActivationKernels {
  ACTIVATION_KERNELS(POINTER_TO)
};
