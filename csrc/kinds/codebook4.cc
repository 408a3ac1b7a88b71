// 4-bit codes with a table of 16 int8 values: value = table[code] * scale.
#include "kinds/kinds.h"
#include "kinds/scalar_rows.h"

namespace quern {
namespace {

class Values {
 public:
  Values(const Weight& weight, int32_t row, int32_t) : codes_(code_row(weight, row)), table_(weight.table) {}
  int32_t operator()(int32_t column) const { return table_[nibble(codes_, column)]; }

 private:
  const uint8_t* codes_;
  const int8_t* table_;
};

int64_t table_bytes(const Weight&) { return 16; }

const KindKernels codebook4_scalar = {multiply_rows_scalar<Values>, nullptr, decode_panel_scalar<Values>};

}  // namespace

const WeightKind codebook4 = {
    "codebook4", false, false, 1, nibble_row_bytes, nullptr, table_bytes, nullptr, decode_row_scalar<Values>,
    {&codebook4_scalar, X86_KERNELS(codebook4_avx2), X86_KERNELS(codebook4_avx512), nullptr},
};

}  // namespace quern
