// 4-bit integers; see rows_avx2-inl.h.
#include "kinds/panel_avx2-inl.h"
#include "kinds/rows_avx2-inl.h"

namespace quern {
namespace {

struct Code {
  static constexpr int PER_BYTE = 2;
  static constexpr bool NARROW = true;
  static constexpr bool SQUARES = true;
  INLINE Code make(const Weight&, int32_t) { return {}; }

  template <int TOKENS>
  INLINE void add(const Code&, __m256i bytes, const Inputs& in, int64_t at, __m256i* sums, int64_t) {
    const __m256i mask = _mm256_set1_epi8(15);
    const __m256i low = _mm256_and_si256(bytes, mask), high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask);
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t) {
      const int8_t* even = in.halves + 2 * t * in.half + at;
      const __m256i both = _mm256_add_epi16(_mm256_maddubs_epi16(low, load(even)), _mm256_maddubs_epi16(high, load(even + in.half)));
      sums[t] = _mm256_add_epi16(sums[t], both);
      if (TOKENS > 1) asm("" : "+x"(sums[t]));  // or additions are put off until there is no register left
    }
  }
};

// Zero points of 32 columns of a row.
INLINE __m256i zeros_of(const Weight& weight, int32_t row, int32_t column) {
  if (weight.zeros == nullptr) return _mm256_set1_epi8(8);
  const int32_t groups = (weight.columns + weight.group - 1) / weight.group, from = weight.scale_stride == 0 ? 0 : row;
  const int32_t* words = weight.zeros + static_cast<int64_t>(from / 8) * groups;
  const auto zero = [&](int32_t group) { return static_cast<char>(words[group] >> 4 * (from % 8) & 15); };
  const int32_t last = least(column + 31, weight.columns - 1);
  if (column / weight.group == last / weight.group) return _mm256_set1_epi8(zero(column / weight.group));
  alignas(32) char each[32] = {};
  for (int32_t c = column; c <= last; ++c) each[c - column] = zero(c / weight.group);
  return load(each);
}

void panel(const Weight& weight, const Part& part, uint8_t flip, int8_t* panel) {
  decode_rows(part, flip, panel, [&](int32_t row, int32_t column) __attribute__((always_inline)) {
    return _mm256_sub_epi8(nibbles_of(weight, row, column), zeros_of(weight, row, column));
  });
}

}  // namespace

const KindKernels integer4_avx2 = {multiply<Code>, nullptr, panel};

}  // namespace quern
