// Python functions from C++ ones. A pointer becomes an address, a struct the words of its fields; 0 stands for absent.
#pragma once
#include <pybind11/pybind11.h>

#include <cctype>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

namespace py = pybind11;
using Address = std::uintptr_t;

template <class Parameter>
using Passed = std::conditional_t<std::is_pointer_v<Parameter>, Address, Parameter>;

// Whether this process was forked. OpenMP's threads do not live on in it, and a parallel region would wait for them for
// ever: its kernels run on the one thread that it has.
inline bool forked = false;

inline int usable(int threads) { return forked ? 1 : threads; }

template <class Parameter>
Parameter given(Passed<Parameter> value) {
  if constexpr (std::is_pointer_v<Parameter>) {
    return reinterpret_cast<Parameter>(value);
  } else if constexpr (std::is_same_v<Parameter, int>) {  // sizes are int64_t
    return usable(value);
  } else {
    return value;
  }
}

// A wrong call becomes a ValueError, where the kernel would end the process.
inline void check(const std::string& kernel, const char* refusal) {
  if (refusal) throw std::invalid_argument(kernel + ": " + refusal + ".");
}

// Of a kernel without a struct: no size is negative, and nothing that has numbers is at no address.
template <class... Parameters>
const char* refusal_of(Passed<Parameters>... values) {
  bool negative = false, empty = false, missing = false;
  const auto look = [&](auto* type, auto value) {
    typedef std::remove_pointer_t<decltype(type)> Parameter;
    if constexpr (std::is_same_v<Parameter, int64_t>) {
      negative |= value < 0;
      empty |= value == 0;
    } else if constexpr (std::is_pointer_v<Parameter>) {
      // A stream is a pointer too, and null is torch's default one.
      missing |= std::is_arithmetic_v<std::remove_pointer_t<Parameter>> && !value;
    }
  };
  (look(static_cast<Parameters*>(nullptr), values), ...);
  return negative ? "a size is negative" : missing && !empty ? "an operand is missing" : nullptr;
}

// The interpreter lock is released: kernels touch no Python objects.
template <class Result, class... Parameters>
void expose(py::module_& m, const std::string& name, Result (*kernel)(Parameters...)) {
  m.def(
      name.c_str(),
      [kernel, name](Passed<Parameters>... values) {
        check(name, refusal_of<Parameters...>(values...));
        return kernel(given<Parameters>(values)...);
      },
      py::call_guard<py::gil_scoped_release>());
}

template <class Arguments, size_t... I>
void expose_words(py::module_& m, const std::string& name, void (*kernel)(const Arguments&, int),
                  std::index_sequence<I...>) {
  m.def(
      name.c_str(),
      [kernel, name](decltype(I, Address())... words, int threads) {
        // The fields are 8-byte words without gaps, as is checked below, so that the words are the struct.
        const Address row[] = {words...};
        Arguments arguments;
        std::memcpy(&arguments, row, sizeof arguments);
        check(name, arguments.refusal());
        kernel(arguments, usable(threads));
      },
      py::call_guard<py::gil_scoped_release>());
}

// The names in "const T *p, *u; int64_t k;": each is the last word in front of a comma or a semicolon.
inline py::tuple names_of(const std::string& fields) {
  py::list names;
  std::string word;
  for (const char c : fields) {
    if (c == ',' || c == ';') {
      names.append(word);
      word.clear();
    } else if (std::isspace(c) || c == '*') {
      word.clear();
    } else {
      word += c;
    }
  }
  return py::tuple(names);
}

// Of a struct's fields Python sees the names, in m.fields[kernel], and passes the values in their order.
template <class Arguments>
void expose(py::module_& m, const std::string& kernel, const std::string& suffix,
            void (*function)(const Arguments&, int)) {
  constexpr size_t words = sizeof(Arguments) / sizeof(Address);
  static_assert(std::is_trivially_copyable_v<Arguments> && words * sizeof(Address) == sizeof(Arguments));
  const py::tuple names = names_of(Arguments::TEXT);
  if (names.size() != words) throw std::logic_error("a field of " + kernel + " is no 8-byte word");
  m.attr("fields")[kernel.c_str()] = names;
  expose_words(m, kernel + suffix, function, std::make_index_sequence<words>());
}
