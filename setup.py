"""Builds sharpkern._C: CPU kernels, once per x86-64 instruction level, and CUDA kernels; needs no torch headers.

Without a C++ compiler the package is built without them: kernels run in plain torch then, right but slower.

Environment:
    CXX: the C++17 compiler, g++ by default.
    SHARPKERN_NO_NATIVE: 1 builds no module even where there is a compiler.
    SHARPKERN_CUDA: auto (default: with the CUDA kernels if nvcc is found), 1 (fail without nvcc), 0 (CPU only).
    CUDA_HOME: the CUDA toolkit, if its nvcc is not on PATH.
"""

import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CPU_SOURCES = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
CUDA_SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
FLAGS = ["-std=c++17", "-O3", "-g0", "-Wall", "-fvisibility=hidden", "-fopenmp"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math"]  # without them roots and comparisons are not vectorised
# The same source for each level; bindings.cpp picks the best one that the machine has when it is imported.
LEVELS = ["v2", "v3", "v4"] if platform.machine() in ("x86_64", "AMD64") else ["any"]
ARCHITECTURES = ["80", "90", "100"]  # Ampere, Hopper, Blackwell; newer chips compile the PTX of the last


class BuildKernels(build_ext):
    """Compiles the kernels and links the objects into the extension."""

    def finalize_options(self):
        super().finalize_options()
        self.force = True  # the environment decides what is built, so file times say nothing

    def build_extension(self, ext):
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        for source in CPU_SOURCES:
            ext.extra_objects += [self._compile_cpu(source, level) for level in LEVELS]
        if nvcc := _find_nvcc():
            ext.extra_objects += [self._compile_cuda(nvcc, source) for source in CUDA_SOURCES]
            ext.sources += ["csrc/cuda/bindings.cpp"]
            ext.define_macros += [("WITH_CUDA", None)]
            ext.extra_link_args += [*_library_folders(nvcc), "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
            ext.extra_link_args += ["-Wl,--exclude-libs,libcudart_static.a"]  # torch brings a runtime of its own
        super().build_extension(ext)

    def _compile_cpu(self, source, level):
        target = Path(self.build_temp) / f"{source.stem}_{level}.o"
        march = [] if level == "any" else [f"-march=x86-64-{level}", "-mtune=generic"]
        command = [os.environ.get("CXX", "g++"), *FLAGS, "-fPIC", *march, f"-DLEVEL={level}", "-I", str(ROOT / "csrc")]
        subprocess.run([*command, "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    def _compile_cuda(self, nvcc, source):
        target = Path(self.build_temp) / f"{source.stem}_cuda.o"
        known = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout.split()
        chips = [a for a in ARCHITECTURES if f"compute_{a}" in known]
        code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in chips]
        code += [f"-gencode=arch=compute_{chips[-1]},code=compute_{chips[-1]}"]
        flags = ["-std=c++17", "-O3", "-cudart", "static", "--threads", "0", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        command = [nvcc, *flags, *code, "-I", str(ROOT / "csrc")]
        subprocess.run([*command, "-c", str(source), "-o", str(target)], check=True)
        return str(target)


def _find_nvcc():
    wish = os.environ.get("SHARPKERN_CUDA", "auto")
    if wish not in ("0", "1", "auto"):
        raise SystemExit(f"SHARPKERN_CUDA must be 0, 1 or auto, got {wish!r}.")
    if wish == "0":
        print("sharpkern: SHARPKERN_CUDA=0, building without CUDA kernels", flush=True)
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = (home and shutil.which("nvcc", path=str(Path(home) / "bin"))) or shutil.which("nvcc")
    if not nvcc and wish == "1":
        raise SystemExit("SHARPKERN_CUDA=1, but nvcc is neither in CUDA_HOME/bin nor on PATH.")
    if not nvcc:
        print("sharpkern: no nvcc in CUDA_HOME/bin or on PATH, building without CUDA kernels", flush=True)
    return nvcc


def _library_folders(nvcc):
    """Return the -L flags that nvcc itself links with; nvcc on PATH may be a script outside the toolkit."""
    plan = subprocess.run([nvcc, "-dryrun", "none.o"], capture_output=True, text=True, check=True).stderr
    line = next(line for line in plan.splitlines() if line.startswith("#$ LIBRARIES="))
    return [word for word in shlex.split(line.partition("=")[2]) if word.startswith("-L")]


def _extensions():
    if os.environ.get("SHARPKERN_NO_NATIVE", "0") == "1":
        print("sharpkern: SHARPKERN_NO_NATIVE=1, building without compiled kernels", flush=True)
        return []
    compiler = shlex.split(os.environ.get("CXX", "g++"))[0]
    if not shutil.which(compiler):
        # Who asks for a compiler or for CUDA kernels wants to know that there are none.
        if "CXX" in os.environ or os.environ.get("SHARPKERN_CUDA") == "1":
            raise SystemExit(f"the C++ compiler {compiler} was not found; SHARPKERN_NO_NATIVE=1 builds without it.")
        print(f"sharpkern: no {compiler} on PATH, building without compiled kernels", flush=True)
        return []
    import pybind11  # only where it is needed

    return [
        Extension(
            "sharpkern._C",
            ["csrc/bindings.cpp"],
            include_dirs=[pybind11.get_include(), "csrc"],
            define_macros=[("X86_LEVELS", None)] if LEVELS != ["any"] else [],
            extra_compile_args=FLAGS,
            extra_link_args=["-fopenmp"],
            language="c++",
        )
    ]


setup(ext_modules=_extensions(), cmdclass={"build_ext": BuildKernels})
