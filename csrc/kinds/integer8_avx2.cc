// 8-bit integers; see rows_avx2-inl.h.
#include "kinds/panel_avx2-inl.h"
#include "kinds/rows_avx2-inl.h"

namespace quern {
namespace {

struct Code {
  static constexpr int PER_BYTE = 1;
  static constexpr bool NARROW = false;
  static constexpr bool SQUARES = false;
  INLINE Code make(const Weight&, int32_t) { return {}; }

  template <int TOKENS>
  INLINE void add(const Code&, __m256i bytes, const Inputs& in, int64_t at, __m256i* sums, int64_t) {
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t)
      sums[t] = _mm256_add_epi32(sums[t], products(bytes, load(in.values + t * in.stride + at)));
  }
};

void panel(const Weight& weight, const Part& part, uint8_t flip, int8_t* panel) {
  decode_rows(part, flip, panel, [&](int32_t row, int32_t column) __attribute__((always_inline)) {
    const int8_t* codes = static_cast<const int8_t*>(weight.codes) + row * weight.row_bytes + column;
    return weight.columns - column >= 32 ? load(codes) : load_some(codes, weight.columns - column);
  });
}

}  // namespace

const KindKernels integer8_avx2 = {multiply<Code>, nullptr, panel};

}  // namespace quern
