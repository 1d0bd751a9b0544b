// A Python module like sharpkern._C.cuda, with the kernels of csrc/cuda/vectors.cu emulated on the CPU.
#include "cuda/bindings.cpp"
#include "cuda/vectors.cu"

PYBIND11_MODULE(cuda_on_cpu, m) {
  bind_cuda(m);
  m.def("reverse", [](bool on) { emulator::reversed = on; });
}
