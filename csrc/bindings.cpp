// sharpkern._C: addresses and sizes in, nothing else. sharpkern/kernels/cpu/native.py turns tensors into addresses.
#ifdef __linux__
#include <sys/mman.h>
#endif
#ifndef _WIN32
#include <pthread.h>
#endif

#include <cstdlib>
#include <cstring>

#include "activation.h"
#include "expose.h"
#include "norm.h"
#include "rows.h"
#include "vectors.h"
#ifdef WITH_CUDA
#include "cuda/bindings.h"
#endif

// The tables of one instruction level.
struct Level {
  const char* name;
  const Table<CpuVectorKernels>& vectors;
  const Table<NormKernels>& norm;
  const Table<RowKernels>& rows;
  const Table<ActivationKernels>& activation;
};
#define DECLARE(level)                                  \
  extern const Table<CpuVectorKernels> vectors_##level; \
  extern const Table<NormKernels> norm_##level;         \
  extern const Table<RowKernels> rows_##level;          \
  extern const Table<ActivationKernels> activation_##level;
#define LEVEL_OF(level) {#level, vectors_##level, norm_##level, rows_##level, activation_##level}

#ifdef X86_LEVELS
DECLARE(v2)
DECLARE(v3)
DECLARE(v4)
static const Level LEVELS[] = {LEVEL_OF(v2), LEVEL_OF(v3), LEVEL_OF(v4)};

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
DECLARE(any)
static const Level LEVELS[] = {LEVEL_OF(any)};
static int choose() { return 0; }
#endif

static const Level& LEVEL = LEVELS[choose()];

template <class T>
static void bind_all(py::module_& m, const std::string& suffix, const CpuVectorKernels<T>& vectors,
                     const NormKernels<T>& norm, const RowKernels<T>& rows, const ActivationKernels<T>& activation) {
#define BIND_VECTOR(name, ...) expose(m, #name + suffix, vectors.name);
  VECTOR_KERNELS(BIND_VECTOR)
#define BIND_NORM(name, Arguments) expose(m, #name, suffix, norm.name);
  NORM_KERNELS(BIND_NORM)
#define BIND_ROWS(name, Arguments) expose(m, #name, suffix, rows.name);
  ROW_KERNELS(BIND_ROWS)
#define BIND_ACTIVATION(name, Arguments) expose(m, #name, suffix, activation.name);
  ACTIVATION_KERNELS(BIND_ACTIVATION)
}

static py::dict activations() {
  py::dict values;
#define VALUE(name) values[#name] = int64_t(Activation::name);
  ACTIVATIONS(VALUE)
  return values;
}

// Advice only: where the system does not follow it, nothing changes.
static void use_huge_pages(Address address, Address bytes) {
#ifdef __linux__
  const Address page = Address(2) << 20;
  const Address first = (address + page - 1) / page * page, last = (address + bytes) / page * page;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels on raw addresses, see the headers in csrc; CUDA kernels, if built, are in .cuda";
  m.def("level", [] { return LEVEL.name; });
  // os.environ.get takes longer than a small kernel; os.environ writes through to here
  m.def("forced_backend", []() -> const char* { return std::getenv("SHARPKERN_BACKEND"); });
  m.def("use_huge_pages", &use_huge_pages);
  m.attr("activations") = activations();
  m.attr("norm_modes") = py::make_tuple(int64_t(FIXED), int64_t(RMS), int64_t(CENTRED));
  m.attr("fields") = py::dict();
#ifndef _WIN32
  pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif
  bind_all<float>(m, "_f32", LEVEL.vectors.f32, LEVEL.norm.f32, LEVEL.rows.f32, LEVEL.activation.f32);
  bind_all<double>(m, "_f64", LEVEL.vectors.f64, LEVEL.norm.f64, LEVEL.rows.f64, LEVEL.activation.f64);
#ifdef WITH_CUDA
  bind_cuda(m.def_submodule("cuda"));
#endif
}
