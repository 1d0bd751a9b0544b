// sharpkern._C: addresses and sizes in, nothing else. sharpkern/kernels/native.py turns tensors into addresses.
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "vectors.h"

namespace py = pybind11;
using Address = std::uintptr_t;

#ifdef X86_LEVELS
extern const KernelTable kernels_v2, kernels_v3, kernels_v4;

// SHARPKERN_CPU_LEVEL (v2, v3, v4) asks for a lower level than the machine's, for tests.
static const KernelTable& choose() {
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  const char* wanted = std::getenv("SHARPKERN_CPU_LEVEL");
  const bool at_most_v2 = wanted && !std::strcmp(wanted, "v2"), at_most_v3 = wanted && !std::strcmp(wanted, "v3");
  if (v4 && !at_most_v2 && !at_most_v3) return kernels_v4;
  if (v3 && !at_most_v2) return kernels_v3;
  return kernels_v2;
}
#else
extern const KernelTable kernels_any;
static const KernelTable& choose() { return kernels_any; }
#endif

static const KernelTable& TABLE = choose();

template <class T>
static T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

template <class T>
static void bind(py::module_& m, const std::string& suffix, const VectorKernels<T>& kernels) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def(("gram_" + suffix).c_str(), [&kernels](Address V, int64_t k, Address W, int64_t m_, int64_t n, Address out, int threads) {
    kernels.gram(at<T>(V), k, at<T>(W), m_, n, at<double>(out), threads);
  }, release());
  m.def(("power_step_" + suffix).c_str(), [&kernels](Address V, Address H, int64_t k, int64_t n, Address theta, Address residual, Address out, int threads) {
    kernels.power_step(at<T>(V), at<T>(H), k, n, at<double>(theta), at<double>(residual), at<T>(out), threads);
  }, release());
  m.def(("combine_" + suffix).c_str(), [&kernels](Address C, int64_t m_, int64_t k, Address V, int64_t n, Address out, int threads) {
    kernels.combine(at<double>(C), m_, k, at<T>(V), n, at<T>(out), threads);
  }, release());
  m.def(("scale_" + suffix).c_str(), [&kernels](Address V, int64_t k, int64_t n, Address d, Address out, int threads) {
    kernels.scale(at<T>(V), k, n, at<T>(d), at<T>(out), threads);
  }, release());
  m.def(("inv_sqrt_adam_" + suffix).c_str(), [&kernels](Address v, int64_t n, double correction, double eps, double factor, Address out, int threads) {
    kernels.inv_sqrt_adam(at<T>(v), n, correction, eps, factor, at<T>(out), threads);
  }, release());
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU vector kernels on raw addresses; see csrc/vectors.h";
  m.def("level", [] { return TABLE.level; });
  bind<float>(m, "f32", TABLE.f32);
  bind<double>(m, "f64", TABLE.f64);
}
