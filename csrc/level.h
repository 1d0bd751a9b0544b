// One instruction level: LEVEL is defined by the build.
#pragma once
#include "kernel.h"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

// The one name that a source of kernels exports: its table at this level. bindings.cpp picks among the levels.
#define EXPORT_TABLE(prefix, Kernels)              \
  extern const Table<Kernels> JOIN(prefix, LEVEL); \
  const Table<Kernels> JOIN(prefix, LEVEL) = {table<float>(), table<double>()};
