// A packed weight from arrays of anybody's: Python's, a file's.
#pragma once

#include <cstdint>
#include <string>

#include "kernels/weight.h"

namespace quern {

// Bytes in memory that outlive whoever reads them; null: there are none.
struct Span {
  const void* data = nullptr;
  int64_t size = 0;
};

struct WeightArrays {
  std::string kind;
  int32_t rows = 0, columns = 0;
  int32_t group = 0;  // columns that share a scale; 0: all
  Float scale_type = Float::float16;
  bool one_scale = false;  // all rows share them
  int32_t bits = 0, window = 0, tables = 1, lag = 0;
  float scale_factor = 1.0f;
  Span codes, scale, zeros, table;  // see weight.h
};

// Throws std::invalid_argument where an array has not the size that the others call for, so that no kernel reads past its
// end, or is not aligned to its numbers.
Weight checked_weight(const WeightArrays& arrays);

// Bytes of the arrays of a weight that was checked.
struct ArrayBytes {
  int64_t codes, scale, zeros, table;
  int64_t total() const { return codes + scale + zeros + table; }
};
ArrayBytes array_bytes(const Weight& weight);

// "float16" and so on. Throws std::invalid_argument, naming those that there are.
Float float_called(const std::string& name);

}  // namespace quern
