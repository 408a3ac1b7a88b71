// A packed weight as Python hands it over: a checked `Weight` that keeps its arrays alive.
#pragma once

#include <optional>
#include <string>

#include "bind/arrays.h"
#include "kernels/weight.h"

namespace quern {

class Matrix {
 public:
  // `codes` and the rest are the artifact's own bytes; see kernels/weight.h. Throws std::invalid_argument where an array
  // has not the size that the others call for, so that no kernel reads past its end, or is not aligned to its numbers.
  Matrix(const std::string& kind, int32_t rows, int32_t columns, Bytes codes, std::optional<Bytes> scale,
         const std::string& scale_type, std::optional<int32_t> group, bool one_scale, std::optional<Bytes> zeros,
         std::optional<Array<int8_t, nanobind::ndim<1>>> table, int32_t bits, int32_t window, int32_t tables, int32_t lag,
         float scale_factor);

  const Weight& weight() const { return weight_; }
  int64_t bytes() const { return bytes_; }

 private:
  Weight weight_{};
  int64_t bytes_ = 0;
  Bytes codes_;
  std::optional<Bytes> scale_, zeros_;
  std::optional<Array<int8_t, nanobind::ndim<1>>> table_;
};

}  // namespace quern
