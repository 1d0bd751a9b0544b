// How a kernel is declared: once, in a list that the CPU kernels, the CUDA kernels and the Python bindings expand.
//   #define FAMILY_KERNELS(KERNEL) KERNEL(name, what it takes) KERNEL(...)
// A kernel takes its arguments as parameters, or, where they are many and alike, as one struct with named FIELDS.
#pragma once
#include <cstdint>

// The fields of a struct, and their text: Python learns the names and the order from it. Each field must be a pointer
// or an int64_t, so that the struct is a row of 8-byte words.
#define FIELDS(...) FIELDS_(__VA_ARGS__)
#define FIELDS_(...) \
  __VA_ARGS__        \
  static constexpr const char* TEXT = #__VA_ARGS__;

// Each struct also says in `refusal` why its kernel cannot take what it holds; nullptr if it can. The bindings ask, so
// that a wrong call is an exception and no signal; addresses that are not null are trusted.

// What to expand a list with: pointers to the functions of a family, and these functions as the values of the pointers.
#define POINTER_TO(name, Arguments) void (*name)(const Arguments<T>&, int threads);
#define VALUE_OF(name, ...) name<T>,

// A family of kernels for both element types.
template <template <class> class Kernels>
struct Table {
  Kernels<float> f32;
  Kernels<double> f64;
};
