// Arrays that come from Python: contiguous, on the CPU, checked.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <memory>
#include <stdexcept>
#include <string>

namespace quern {

template <typename T, typename... Extra>
using Array = nanobind::ndarray<const T, nanobind::c_contig, nanobind::device::cpu, Extra...>;

using Bytes = Array<uint8_t, nanobind::ndim<1>>;
using Floats = Array<float, nanobind::ndim<1>>;

inline void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

// A float32 array (rows, columns) that Python owns from here on.
inline nanobind::ndarray<nanobind::numpy, float, nanobind::ndim<2>> owned(std::unique_ptr<float[]> data, size_t rows,
                                                                        size_t columns) {
  float* raw = data.release();
  nanobind::capsule owner(raw, [](void* p) noexcept { delete[] static_cast<float*>(p); });
  return {raw, {rows, columns}, owner};
}

}  // namespace quern
