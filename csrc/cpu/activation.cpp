// Derivatives of activations, with one exponential for each number and nothing that keeps a loop from being vectorised.
//   GELU              y = x Phi(x)          y' = y / x + x phi(x)            y'' = (2 - x^2) phi(x)
//   gated by sigmoid  y = x s, s = s(w(x))  y' = s + x s' w'                 y'' = s' (2 w' + x ((1 - 2s) w'^2 + w''))
//   with w = x for SiLU and w = 2 c (x + a x^3) for GELU by tanh. s' = s (1 - s) comes from e^-|w|: 1 - s would cancel.
//   sigmoid           y = s(x)              y' = s'                          y'' = s' (1 - 2s)
//   tanh              y = 2 s(2x) - 1       y' = 4 s'(2x)                    y'' = -2 y y'
//   softplus          y = log(1 + e^x)      y' = s                           y'' = s', and the line y = x from 20 on
//   Mish              y = x t               y' = t + x t'                    y'' = t' (2 + x (1 - s - 2 s t))
//   with t = tanh(softplus x) = n / (n + 2), n = e^2x + 2 e^x, and t' = s (1 - t^2)
#include "activation.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "level.h"
#include "parallel.h"

namespace {

constexpr int64_t SMALL = 8192;    // numbers below which waking the other threads costs more than it saves
constexpr int64_t STRETCH = 2048;  // numbers that one thread takes at a time

template <class T>
struct Format;

// ln 2 in two parts, the first with zeros at its end: multiples of it are exact. MAGIC + k holds k in its lowest bits.
template <>
struct Format<float> {
  typedef uint32_t Bits;
  static constexpr int MANTISSA = 23, TERMS = 7;
  static constexpr float HIGH = 0.693359375f, LOW = -2.12194440e-4f, MAGIC = 12582912.f, LEAST = -87.f, TINY = 1e-30f;
};
template <>
struct Format<double> {
  typedef uint64_t Bits;
  static constexpr int MANTISSA = 52, TERMS = 13;
  static constexpr double HIGH = 6.93147180369123816490e-01, LOW = 1.90821492927058770002e-10,
                          MAGIC = 6755399441055744., LEAST = -708., TINY = 1e-290;
};

// e^x for x <= 0: 2^k times a Taylor sum over |r| <= ln(2) / 2, whose rest is below the rounding. Zero below LEAST, and
// NaN for NaN.
template <class T>
inline T decay(T x) {
  typedef Format<T> F;
  typedef typename F::Bits Bits;
  const T inside = x > F::LEAST ? x : F::LEAST;
  const T shifted = inside * T(1.44269504088896340736) + F::MAGIC, k = shifted - F::MAGIC;
  const T r = (inside - k * F::HIGH) - k * F::LOW;
  T sum = 1;
#pragma GCC unroll 16
  for (int i = F::TERMS; i > 0; --i) sum = T(1) + sum * (r * (T(1) / T(i)));
  Bits exponent, bits;
  std::memcpy(&exponent, &shifted, sizeof bits);
  std::memcpy(&bits, &sum, sizeof bits);
  bits += exponent << F::MANTISSA;
  std::memcpy(&sum, &bits, sizeof bits);
  return x < F::LEAST ? T(0) : x == x ? sum : x;  // NaN has no exponent that could be added
}

template <class T>
struct Gelu {
  static T density(T x) { return T(0.39894228040143267794) * decay<T>(T(-0.5) * x * x); }
  static T slope(T x, T y) {
    // Phi(x) = y / x saves the error function; towards zero it is 1/2, where y / x would be 0 / 0.
    const T share = std::abs(x) < Format<T>::TINY ? T(0.5) : y / x;
    return share + x * density(x);
  }
  static T curvature(T x) { return (T(2) - x * x) * density(x); }
};

template <class T>
struct Silu {
  static T gate(T x) { return x; }
  static T gate1(T) { return T(1); }
  static T gate2(T) { return T(0); }
};

template <class T>
struct GeluTanh {
  static constexpr T C = T(2 * 0.79788456080286535588), A = T(0.044715);
  static T gate(T x) { return C * (x + A * x * x * x); }
  static T gate1(T x) { return C * (T(1) + T(3) * A * x * x); }
  static T gate2(T x) { return T(6) * A * C * x; }
};

template <class T, template <class> class Gate>
struct Gated {
  static T slope(T x, T) {
    const T w = Gate<T>::gate(x), e = decay<T>(-std::abs(w)), q = T(1) / (T(1) + e);
    return (w > 0 ? q : e * q) + x * (e * q * q * Gate<T>::gate1(x));
  }
  static T curvature(T x) {
    const T w = Gate<T>::gate(x), w1 = Gate<T>::gate1(x), e = decay<T>(-std::abs(w)), q = T(1) / (T(1) + e);
    const T bend = (w > 0 ? e - T(1) : T(1) - e) * q;  // 1 - 2s
    return e * q * q * (T(2) * w1 + x * (bend * w1 * w1 + Gate<T>::gate2(x)));
  }
};

// s, s' and 1 - 2s at w.
template <class T>
struct Sigmoid {
  T s, first, bend;
  explicit Sigmoid(T w) {
    const T e = decay<T>(-std::abs(w)), q = T(1) / (T(1) + e);
    s = w > 0 ? q : e * q;
    first = e * q * q;
    bend = (w > 0 ? e - T(1) : T(1) - e) * q;
  }
  static T slope(T x, T) { return Sigmoid(x).first; }
  static T curvature(T x) {
    const Sigmoid at(x);
    return at.first * at.bend;
  }
};

template <class T>
struct Tanh {
  static T slope(T x, T) { return T(4) * Sigmoid<T>(T(2) * x).first; }
  static T curvature(T x) {
    const Sigmoid<T> at(T(2) * x);
    return T(8) * at.first * at.bend;
  }
};

template <class T>
struct Softplus {
  static constexpr T LINE = 20;
  static T slope(T x, T) { return x > LINE ? T(1) : Sigmoid<T>(x).s; }
  static T curvature(T x) { return x > LINE ? T(0) : Sigmoid<T>(x).first; }
};

template <class T>
struct Mish {
  T t, s, first;  // t' = s (1 - t) (1 + t), as 1 - t^2 would cancel
  explicit Mish(T x) {
    const T e = decay<T>(-std::abs(x)), q = T(1) / (T(1) + e);
    const bool right = x > 0;
    // n and n + 2, times e^-2x on the right, where n overflows
    const T n = right ? T(1) + T(2) * e : e * (e + T(2)), rest = right ? T(2) * e * e : T(2);
    const T share = T(1) / (n + rest);
    t = n * share;
    s = right ? q : e * q;
    first = s * (rest * share) * (T(1) + t);
  }
  static T slope(T x, T) {
    const Mish at(x);
    return at.t + x * at.first;
  }
  static T curvature(T x) {
    const Mish at(x);
    return at.first * (T(2) + x * (T(1) - at.s - T(2) * at.s * at.t));
  }
};

template <class Body>
void pass(int64_t n, int threads, const Body& body) {
  each((n + STRETCH - 1) / STRETCH, n > SMALL ? threads : 1,
       [&](int64_t s) { body(s * STRETCH, std::min(STRETCH, n - s * STRETCH)); });
}

template <class F, class T>
void slope_of(const ActivationSlope<T>& a, int threads) {
  pass(a.n, threads, [&](int64_t from, int64_t size) {
    const T* __restrict__ x = a.x + from, * __restrict__ y = a.y + from;
    T* __restrict__ out = a.out + from;
    for (int64_t i = 0; i < size; ++i) out[i] = F::slope(x[i], y[i]);
  });
}

template <class F, class T>
void curvature_of(const ActivationCurvature<T>& a, int threads) {
  pass(a.n, threads, [&](int64_t from, int64_t size) {
    const T* __restrict__ x = a.x + from, * __restrict__ g = a.g + from;
    T* __restrict__ out = a.out + from;
    for (int64_t i = 0; i < size; ++i) out[i] = g[i] * F::curvature(x[i]);
  });
}

template <class F>
struct Formula {
  typedef F Type;
};

// Calls use(Formula<F>()) for the formulas F of an activation.
template <class T, class Use>
void with_formula(int64_t activation, const Use& use) {
  switch (Activation(activation)) {
    case Activation::gelu:
      return use(Formula<Gelu<T>>());
    case Activation::gelu_tanh:
      return use(Formula<Gated<T, GeluTanh>>());
    case Activation::silu:
      return use(Formula<Gated<T, Silu>>());
    case Activation::tanh:
      return use(Formula<Tanh<T>>());
    case Activation::sigmoid:
      return use(Formula<Sigmoid<T>>());
    case Activation::softplus:
      return use(Formula<Softplus<T>>());
    case Activation::mish:
      return use(Formula<Mish<T>>());
  }
}

template <class T>
void activation_slope(const ActivationSlope<T>& a, int threads) {
  with_formula<T>(a.activation, [&](auto f) { slope_of<typename decltype(f)::Type>(a, threads); });
}

template <class T>
void activation_curvature(const ActivationCurvature<T>& a, int threads) {
  with_formula<T>(a.activation, [&](auto f) { curvature_of<typename decltype(f)::Type>(a, threads); });
}

template <class T>
constexpr ActivationKernels<T> table() {
  return {ACTIVATION_KERNELS(VALUE_OF)};
}

}  // namespace

EXPORT_TABLE(activation_, ActivationKernels)
