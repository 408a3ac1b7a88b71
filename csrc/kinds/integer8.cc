// 8-bit integers: value = code * scale.
#include "kinds/kinds.h"
#include "kinds/scalar_rows.h"

namespace quern {
namespace {

class Values {
 public:
  Values(const Weight& weight, int32_t row, int32_t) : codes_(code_row(weight, row)) {}
  int32_t operator()(int32_t column) const { return static_cast<int8_t>(codes_[column]); }

 private:
  const uint8_t* codes_;
};

int64_t row_bytes(int64_t columns) { return columns; }

const KindKernels integer8_scalar = {multiply_rows_scalar<Values>, nullptr, decode_panel_scalar<Values>};

}  // namespace

const WeightKind integer8 = {
    "integer8", false, true, false, 1, row_bytes, nullptr, nullptr, nullptr, decode_row_scalar<Values>,
    {&integer8_scalar, FIRST_KERNELS(integer8_avx2, integer8_neon), AVX512_KERNELS(integer8_avx512), nullptr},
};

}  // namespace quern
