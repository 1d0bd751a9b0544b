"""Builds sharpkern._C: the CPU kernels, once per x86-64 instruction level; needs a C++17 compiler, no torch headers."""

import os
import platform
import subprocess
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
HEADERS = [str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.h")]
FLAGS = ["-std=c++17", "-O3", "-g0", "-Wall", "-fvisibility=hidden", "-fopenmp"]
# The same source for each level; bindings.cpp picks the best one that the machine has when it is imported.
LEVELS = ["v2", "v3", "v4"] if platform.machine() in ("x86_64", "AMD64") else ["any"]


class BuildKernels(build_ext):
    """Compiles the kernels once per instruction level and links the objects into the extension."""

    def build_extension(self, ext):
        for source in SOURCES:
            ext.extra_objects += [self._compile(source, level) for level in LEVELS]
        super().build_extension(ext)

    def _compile(self, source, level):
        target = Path(self.build_temp) / f"{source.stem}_{level}.o"
        target.parent.mkdir(parents=True, exist_ok=True)
        march = [] if level == "any" else [f"-march=x86-64-{level}", "-mtune=generic"]
        command = [
            os.environ.get("CXX", "g++"),
            *FLAGS,
            "-fPIC",
            *march,
            f"-DLEVEL={level}",
            "-I",
            str(ROOT / "csrc"),
        ]
        subprocess.run([*command, "-c", str(source), "-o", str(target)], check=True)
        return str(target)


setup(
    ext_modules=[
        Extension(
            "sharpkern._C",
            ["csrc/bindings.cpp"],
            include_dirs=[pybind11.get_include(), "csrc"],
            define_macros=[("X86_LEVELS", None)] if LEVELS != ["any"] else [],
            extra_compile_args=FLAGS,
            extra_link_args=["-fopenmp"],
            depends=[*HEADERS, *(str(p.relative_to(ROOT)) for p in SOURCES), "setup.py"],
            language="c++",
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
