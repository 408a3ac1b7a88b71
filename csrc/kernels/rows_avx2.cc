// Products of rows and few tokens for codes that lie along the rows; see rows_avx512.cc. vpmaddubsw adds two products in 16
// bits: 4-bit integers stay far below their limit, so eight of its results are added before they are widened; values of
// more bits are widened at once.
#include "kernels/common_avx2.h"
#include "kernels/tables.h"

namespace quern {
namespace {

constexpr int64_t AHEAD = 2048;  // bytes of codes fetched in advance
constexpr int NARROW = 4;        // registers of nibbles whose sums fit 16 bits: 4 * 2 * 2 * 15 * 127 = 30480

struct Nibbles {
  static constexpr int PER_BYTE = 2, BATCH = NARROW;
  INLINE Nibbles make(const Weight&) { return {}; }

  // sums += products of `count` registers at `bytes` with the inputs at even and odd.
  template <int TOKENS>
  INLINE void add(const Nibbles&, const __m256i* bytes, int count, const Inputs& in, int64_t at, __m256i* sums) {
    const __m256i mask = _mm256_set1_epi8(15);
    __m256i narrow[TOKENS];
    for (__m256i& v : narrow) v = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) {
      const __m256i low = _mm256_and_si256(bytes[i], mask), high = _mm256_and_si256(_mm256_srli_epi16(bytes[i], 4), mask);
#pragma GCC unroll 8
      for (int t = 0; t < TOKENS; ++t) {
        const int8_t* even = in.halves + 2 * t * in.half + at + 32 * i;
        const __m256i both = _mm256_add_epi16(_mm256_maddubs_epi16(low, load(even)), _mm256_maddubs_epi16(high, load(even + in.half)));
        narrow[t] = _mm256_add_epi16(narrow[t], both);
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t)
      sums[t] = _mm256_add_epi32(sums[t], _mm256_madd_epi16(narrow[t], _mm256_set1_epi16(1)));
  }
};

struct Codebook {
  static constexpr int PER_BYTE = 2, BATCH = 1;
  __m256i table;
  INLINE Codebook make(const Weight& weight) {
    return {_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weight.table)))};
  }

  template <int TOKENS>
  INLINE void add(const Codebook& self, const __m256i* bytes, int, const Inputs& in, int64_t at, __m256i* sums) {
    const __m256i mask = _mm256_set1_epi8(15);
    const __m256i low = _mm256_shuffle_epi8(self.table, _mm256_and_si256(*bytes, mask));
    const __m256i high = _mm256_shuffle_epi8(self.table, _mm256_and_si256(_mm256_srli_epi16(*bytes, 4), mask));
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t) {
      const int8_t* even = in.halves + 2 * t * in.half + at;
      sums[t] = _mm256_add_epi32(sums[t], _mm256_add_epi32(products(low, load(even)), products(high, load(even + in.half))));
    }
  }
};

struct Bytes {
  static constexpr int PER_BYTE = 1, BATCH = 1;
  INLINE Bytes make(const Weight&) { return {}; }

  template <int TOKENS>
  INLINE void add(const Bytes&, const __m256i* bytes, int, const Inputs& in, int64_t at, __m256i* sums) {
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t)
      sums[t] = _mm256_add_epi32(sums[t], products(*bytes, load(in.values + t * in.stride + at)));
  }
};

// Inputs past the end of a group belong to the next one, so codes there must be worth nothing: zero for nibbles and bytes;
// for a table, whose entry 0 may be anything, the inputs are copied and filled up instead.
template <typename Code, int TOKENS>
INLINE void add_some(const Code& code, const uint8_t* row, const Inputs& in, int64_t at, int64_t count, __m256i* sums) {
  const __m256i bytes = load_some(row + at, count);
  alignas(32) int8_t copies[TOKENS][2][32];
  Inputs few = in;
  for (int t = 0; t < TOKENS; ++t)
    for (int which = 0; which < Code::PER_BYTE; ++which) {
      const int8_t* x = Code::PER_BYTE == 2 ? in.halves + (2 * t + which) * in.half : in.values + t * in.stride;
      _mm256_store_si256(reinterpret_cast<__m256i*>(copies[t][which]), load_some(x + at, count));
    }
  few.halves = few.values = copies[0][0];
  few.half = 32;
  few.stride = 64;
  Code::template add<TOKENS>(code, &bytes, 1, few, 0, sums);
}

// Sums of the bytes [at, end) of a row.
template <typename Code, int TOKENS>
INLINE void add_range(const Code& code, const uint8_t* row, const Inputs& in, int64_t at, int64_t end, __m256i* sums) {
  constexpr int BATCH = Code::BATCH;
  for (; at + 32 * BATCH <= end; at += 32 * BATCH) {
    __m256i bytes[BATCH];
#pragma GCC unroll 4
    for (int i = 0; i < BATCH; ++i) {
      _mm_prefetch(reinterpret_cast<const char*>(row + at + 32 * i + AHEAD), _MM_HINT_T0);
      bytes[i] = load(row + at + 32 * i);
    }
    Code::template add<TOKENS>(code, bytes, BATCH, in, at, sums);
  }
  for (; at + 32 <= end; at += 32) {
    const __m256i bytes = load(row + at);
    Code::template add<TOKENS>(code, &bytes, 1, in, at, sums);
  }
  if (at < end) add_some<Code, TOKENS>(code, row, in, at, end - at, sums);
}

INLINE int32_t zero_of(const Weight& weight, const Inputs& in, int32_t row, int32_t group) {
  if (weight.kind != Kind::integer4) return 0;
  if (weight.zeros == nullptr) return 8;
  const int32_t at = weight.scale_stride == 0 ? 0 : row;
  return weight.zeros[static_cast<int64_t>(at / 8) * in.groups + group] >> 4 * (at % 8) & 15;
}

template <typename Code, int TOKENS>
void multiply_rows(const Weight& weight, const Inputs& in, int32_t first, int32_t last, float* outputs) {
  const Code code = Code::make(weight);
  for (int32_t row = first; row < last; ++row) {
    const uint8_t* bytes = static_cast<const uint8_t*>(weight.codes) + row * weight.row_bytes;
    float out[TOKENS] = {};
    for (int32_t g = 0; g < in.groups; ++g) {
      const int32_t end = least((g + 1) * in.group, in.columns);
      __m256i sums[TOKENS];
      for (__m256i& v : sums) v = _mm256_setzero_si256();
      add_range<Code, TOKENS>(code, bytes, in, g * in.group / Code::PER_BYTE, (end + Code::PER_BYTE - 1) / Code::PER_BYTE, sums);
      const float ws = number(weight.scale, weight.scale_type, row * weight.scale_stride + g);
      const int32_t zero = zero_of(weight, in, row, g);
      for (int t = 0; t < TOKENS; ++t) {
        const int64_t at = static_cast<int64_t>(t) * in.groups + g;
        out[t] = __builtin_fmaf(static_cast<float>(sum(sums[t]) - zero * in.sums[at]), ws * in.scale[at], out[t]);
      }
    }
    for (int t = 0; t < TOKENS; ++t) outputs[t * in.rows + row] = out[t];
  }
}

template <typename Code>
void multiply(const Weight& weight, const Inputs& in, int32_t first, int32_t last, float* outputs) {
  switch (in.tokens) {
    case 1: return multiply_rows<Code, 1>(weight, in, first, last, outputs);
    case 2: return multiply_rows<Code, 2>(weight, in, first, last, outputs);
    case 3: return multiply_rows<Code, 3>(weight, in, first, last, outputs);
    case 4: return multiply_rows<Code, 4>(weight, in, first, last, outputs);
    case 5: return multiply_rows<Code, 5>(weight, in, first, last, outputs);
    case 6: return multiply_rows<Code, 6>(weight, in, first, last, outputs);
    case 7: return multiply_rows<Code, 7>(weight, in, first, last, outputs);
    default: return multiply_rows<Code, 8>(weight, in, first, last, outputs);
  }
}

}  // namespace

const Kernels rows_avx2 = {
    "avx2",  nullptr, nullptr, nullptr, nullptr, multiply<Nibbles>, multiply<Bytes>, multiply<Codebook>, nullptr, nullptr,
    nullptr, nullptr, 0,       nullptr, nullptr, nullptr,           nullptr,
};

}  // namespace quern
