// 4-bit integers: value = (code - zero point) * scale. Zero points are packed down the rows; without any they are 8.
#include "kinds/kinds.h"
#include "kinds/scalar_rows.h"

namespace quern {
namespace {

int32_t zero_point(const Weight& weight, int32_t row, int32_t group) {
  if (weight.zeros == nullptr) return 8;
  const int32_t groups = (weight.columns + weight.group - 1) / weight.group;
  const int32_t at = weight.scale_stride == 0 ? 0 : row;
  return weight.zeros[static_cast<int64_t>(at / 8) * groups + group] >> 4 * (at % 8) & 15;
}

class Values {
 public:
  Values(const Weight& weight, int32_t row, int32_t group)
      : codes_(code_row(weight, row)), zero_(zero_point(weight, row, group)) {}
  int32_t operator()(int32_t column) const { return nibble(codes_, column) - zero_; }

 private:
  const uint8_t* codes_;
  int32_t zero_;
};

const KindKernels integer4_scalar = {multiply_rows_scalar<Values>, nullptr, decode_panel_scalar<Values>};

}  // namespace

const WeightKind integer4 = {
    "integer4", false, true, true, 1, nibble_row_bytes, nullptr, nullptr, nullptr, decode_row_scalar<Values>,
    {&integer4_scalar, FIRST_KERNELS(integer4_avx2, integer4_neon), AVX512_KERNELS(integer4_avx512), nullptr},
};

}  // namespace quern
