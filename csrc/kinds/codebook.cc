// Codes of 2 to 4 bits with tables of int8 values: value = table[code] * scale.
#include "kinds/codebook-inl.h"
#include "kinds/kinds.h"
#include "kinds/scalar_rows.h"

namespace quern {
namespace {

template <int BITS>
int64_t packed_row_bytes(int64_t columns) {
  if (BITS == 4) return nibble_row_bytes(columns);
  const int64_t low = (columns + 15) / 16 * 4;
  if (BITS == 2) return low;
  return low + columns / PLANE_COLUMNS * 32 + (columns % PLANE_COLUMNS + 31) / 32 * 4;
}

template <int BITS>
class CodebookValues {
 public:
  CodebookValues(const Weight& weight, int32_t row, int32_t group)
      : codes_(codes_of(weight, row)), table_(table_of(weight, row, group)), columns_(weight.columns) {}
  int32_t operator()(int32_t column) const { return table_[code(column)]; }

 private:
  int32_t code(int32_t column) const {
    if (BITS == 4) return nibble(codes_, column);
    const int32_t low = codes_[column / 4] >> 2 * (column % 4) & 3;
    if (BITS == 2) return low;
    // Eight bytes of lower bits are a byte of a plane.
    const int64_t byte = column / 4;
    const uint64_t bits = third_bits(codes_, columns_, byte / 8 * 8, column % 4);
    return low | static_cast<int32_t>(bits >> byte % 8 & 1) << 2;
  }

  const uint8_t* codes_;
  const int8_t* table_;
  int32_t columns_;
};

template <int BITS>
int64_t table_bytes(const Weight&) {
  return 1 << BITS;
}

}  // namespace

#define CODEBOOK(BITS)                                                                                                      \
  const KindKernels codebook##BITS##_scalar = {multiply_rows_scalar<CodebookValues<BITS>>, nullptr,                        \
                                               decode_panel_scalar<CodebookValues<BITS>>};                                 \
  const WeightKind codebook##BITS = {                                                                                       \
      "codebook" #BITS, false, true, false, 1, packed_row_bytes<BITS>, nullptr, table_bytes<BITS>, nullptr,                 \
      decode_row_scalar<CodebookValues<BITS>>,                                                                              \
      {&codebook##BITS##_scalar, FIRST_KERNELS(codebook##BITS##_avx2, codebook##BITS##_neon), AVX512_KERNELS(codebook##BITS##_avx512), nullptr}, \
  }

CODEBOOK(2);
CODEBOOK(3);
CODEBOOK(4);

}  // namespace quern
