// sharpkern._C.cuda: device addresses, sizes and a stream in. sharpkern/kernels/cuda.py turns tensors into addresses.
#include "cuda/bindings.h"

#include "cuda/vectors.h"
#include "expose.h"

template <class T>
static void bind_all(py::module_& m, const std::string& suffix, const cuda::Kernels<T>& kernels,
                     const cuda::Workspaces<T>& workspaces) {
#define BIND_KERNEL(name, ...) expose(m, #name + suffix, kernels.name);
  VECTOR_KERNELS(BIND_KERNEL)
#define BIND_WORKSPACE(name, ...) expose(m, #name "_workspace" + suffix, workspaces.name);
  WORKSPACES(BIND_WORKSPACE)
}

void bind_cuda(py::module_ m) {
  m.doc() = "CUDA vector kernels on raw device addresses; see csrc/cuda/vectors.h";
  m.def("problem", [] { return cuda::problem(); });
  bind_all<float>(m, "_f32", cuda::kernels.f32, cuda::workspaces.f32);
  bind_all<double>(m, "_f64", cuda::kernels.f64, cuda::workspaces.f64);
}
