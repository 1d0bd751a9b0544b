// sharpkern._C.cuda: device addresses, sizes and a stream in. sharpkern/kernels/cuda.py turns tensors into addresses.
#include "cuda/bindings.h"

#include <cstdint>
#include <string>

#include "cuda/vectors.h"

namespace py = pybind11;
using Address = std::uintptr_t;

template <class T>
static T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

static cuda::Stream on(Address stream) { return reinterpret_cast<cuda::Stream>(stream); }

template <class T>
static void bind(py::module_& m, const std::string& suffix) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def(("gram_workspace_" + suffix).c_str(), cuda::gram_workspace<T>);
  m.def(("power_step_workspace_" + suffix).c_str(), cuda::power_step_workspace<T>);
  m.def(("gram_" + suffix).c_str(), [](Address V, int64_t k, Address W, int64_t m_, int64_t n, Address out, Address workspace, Address stream) {
    cuda::gram(at<T>(V), k, at<T>(W), m_, n, at<double>(out), at<double>(workspace), on(stream));
  }, release());
  m.def(("power_step_" + suffix).c_str(), [](Address V, Address H, int64_t k, int64_t n, Address theta, Address residual, Address out, Address workspace, Address stream) {
    cuda::power_step(at<T>(V), at<T>(H), k, n, at<double>(theta), at<double>(residual), at<T>(out), at<double>(workspace), on(stream));
  }, release());
  m.def(("combine_" + suffix).c_str(), [](Address C, int64_t m_, int64_t k, Address V, int64_t n, Address out, Address stream) {
    cuda::combine(at<double>(C), m_, k, at<T>(V), n, at<T>(out), on(stream));
  }, release());
  m.def(("scale_" + suffix).c_str(), [](Address V, int64_t k, int64_t n, Address d, Address out, Address stream) {
    cuda::scale(at<T>(V), k, n, at<T>(d), at<T>(out), on(stream));
  }, release());
  m.def(("inv_sqrt_adam_" + suffix).c_str(), [](Address v, int64_t n, double correction, double eps, double factor, Address out, Address stream) {
    cuda::inv_sqrt_adam(at<T>(v), n, correction, eps, factor, at<T>(out), on(stream));
  }, release());
}

void bind_cuda(py::module_ m) {
  m.doc() = "CUDA vector kernels on raw device addresses; see csrc/cuda/vectors.h";
  m.def("problem", [] { return cuda::problem(); });
  bind<float>(m, "f32");
  bind<double>(m, "f64");
}
