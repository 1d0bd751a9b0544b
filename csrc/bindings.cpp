// sharpkern._C: addresses and sizes in, nothing else. sharpkern/kernels/cpu/native.py turns tensors into addresses.
#include <pybind11/pybind11.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "activation.h"
#include "norm.h"
#include "rows.h"
#include "vectors.h"
#ifdef WITH_CUDA
#include "cuda/bindings.h"
#endif

namespace py = pybind11;
using Address = std::uintptr_t;

#ifdef X86_LEVELS
extern const KernelTable kernels_v2, kernels_v3, kernels_v4;
extern const NormTable norm_v2, norm_v3, norm_v4;
extern const RowTable rows_v2, rows_v3, rows_v4;
extern const ActivationTable activation_v2, activation_v3, activation_v4;
static const KernelTable* const VECTOR_TABLES[] = {&kernels_v2, &kernels_v3, &kernels_v4};
static const NormTable* const NORM_TABLES[] = {&norm_v2, &norm_v3, &norm_v4};
static const RowTable* const ROW_TABLES[] = {&rows_v2, &rows_v3, &rows_v4};
static const ActivationTable* const ACTIVATION_TABLES[] = {&activation_v2, &activation_v3, &activation_v4};

// SHARPKERN_CPU_LEVEL (v2, v3, v4) asks for a lower level than the machine's, for tests.
static int choose() {
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  const char* wanted = std::getenv("SHARPKERN_CPU_LEVEL");
  const bool at_most_v2 = wanted && !std::strcmp(wanted, "v2"), at_most_v3 = wanted && !std::strcmp(wanted, "v3");
  return v4 && !at_most_v2 && !at_most_v3 ? 2 : v3 && !at_most_v2 ? 1 : 0;
}
#else
extern const KernelTable kernels_any;
extern const NormTable norm_any;
extern const RowTable rows_any;
extern const ActivationTable activation_any;
static const KernelTable* const VECTOR_TABLES[] = {&kernels_any};
static const NormTable* const NORM_TABLES[] = {&norm_any};
static const RowTable* const ROW_TABLES[] = {&rows_any};
static const ActivationTable* const ACTIVATION_TABLES[] = {&activation_any};
static int choose() { return 0; }
#endif

static const int LEVEL = choose();
static const KernelTable& TABLE = *VECTOR_TABLES[LEVEL];
static const NormTable& NORM = *NORM_TABLES[LEVEL];
static const RowTable& ROWS = *ROW_TABLES[LEVEL];
static const ActivationTable& ACTIVATION = *ACTIVATION_TABLES[LEVEL];

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

// An address of 0 stands for an absent tensor.
template <class T>
static void bind_norm(py::module_& m, const std::string& suffix, const NormKernels<T>& kernels) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def(("norm_tangent_" + suffix).c_str(), [&kernels](int64_t k, int64_t rows, int64_t D, int64_t groups, int64_t inner, int mode, int threads, Address xhat, Address r, Address w, Address dx, Address dw, Address db, Address y, Address dxhat, Address along) {
    kernels.tangent({k, rows, D, groups, inner, mode, threads}, at<T>(xhat), at<T>(r), at<T>(w), at<T>(dx), at<T>(dw), at<T>(db), at<T>(y), at<T>(dxhat), at<T>(along));
  }, release());
  m.def(("norm_backward_tangent_" + suffix).c_str(), [&kernels](int64_t k, int64_t rows, int64_t D, int64_t groups, int64_t inner, int mode, int threads, Address xhat, Address r, Address w, Address dw, Address dxhat, Address along, Address g, Address dg, Address out, Address dgw, Address dgb) {
    kernels.backward_tangent({k, rows, D, groups, inner, mode, threads}, at<T>(xhat), at<T>(r), at<T>(w), at<T>(dw), at<T>(dxhat), at<T>(along), at<T>(g), at<T>(dg), at<T>(out), at<T>(dgw), at<T>(dgb));
  }, release());
}

template <class T>
static void bind_rows(py::module_& m, const std::string& suffix, const RowKernels<T>& kernels) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def(("slope_product_" + suffix).c_str(), [&kernels](Address slope, Address d, Address curvature, Address dz, int64_t k, int64_t n, Address out, int threads) {
    kernels.slope_product(at<T>(slope), at<T>(d), at<T>(curvature), at<T>(dz), k, n, at<T>(out), threads);
  }, release());
  m.def(("softmax_jacobian_" + suffix).c_str(), [&kernels](Address p, Address u, Address weight, int64_t k, int64_t rows, int64_t C, Address out, Address mean, int threads) {
    kernels.softmax_jacobian(at<T>(p), at<T>(u), at<T>(weight), k, rows, C, at<T>(out), at<T>(mean), threads);
  }, release());
  m.def(("softmax_backward_tangent_" + suffix).c_str(), [&kernels](Address p, Address dp, Address inner, Address dg, int64_t k, int64_t rows, int64_t C, Address out, int threads) {
    kernels.softmax_backward_tangent(at<T>(p), at<T>(dp), at<T>(inner), at<T>(dg), k, rows, C, at<T>(out), threads);
  }, release());
}

template <class T>
static void bind_activation(py::module_& m, const std::string& suffix, const ActivationKernels<T>& kernels) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def(("activation_slope_" + suffix).c_str(), [&kernels](int activation, Address x, Address y, int64_t n, Address out, int threads) {
    kernels.slope(activation, at<T>(x), at<T>(y), n, at<T>(out), threads);
  }, release());
  m.def(("activation_curvature_" + suffix).c_str(), [&kernels](int activation, Address x, Address g, int64_t n, Address out, int threads) {
    kernels.curvature(activation, at<T>(x), at<T>(g), n, at<T>(out), threads);
  }, release());
}

// Advice only: where the system does not follow it, nothing changes.
static void use_huge_pages(Address address, Address bytes) {
#ifdef __linux__
  const Address page = Address(2) << 20, first = (address + page - 1) / page * page, last = (address + bytes) / page * page;
  if (last > first) madvise(at<void>(first), last - first, MADV_HUGEPAGE);
#endif
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels on raw addresses, see the headers in csrc; CUDA kernels, if built, are in .cuda";
  m.def("level", [] { return TABLE.level; });
  // os.environ.get takes longer than a small kernel; os.environ writes through to here
  m.def("forced_backend", []() -> const char* { return std::getenv("SHARPKERN_BACKEND"); });
  m.def("use_huge_pages", &use_huge_pages);
  bind<float>(m, "f32", TABLE.f32);
  bind<double>(m, "f64", TABLE.f64);
  bind_norm<float>(m, "f32", NORM.f32);
  bind_norm<double>(m, "f64", NORM.f64);
  bind_rows<float>(m, "f32", ROWS.f32);
  bind_rows<double>(m, "f64", ROWS.f64);
  bind_activation<float>(m, "f32", ACTIVATION.f32);
  bind_activation<double>(m, "f64", ACTIVATION.f64);
#ifdef WITH_CUDA
  bind_cuda(m.def_submodule("cuda"));
#endif
}
