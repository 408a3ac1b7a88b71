// Quantizing, rotating, scales and plain matrices.
#include "kernels/common_avx512.h"
#include "kernels/tables.h"

namespace quern {
namespace {

INLINE int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }

INLINE void quantize_group(const float* x, int32_t count, int8_t* values, float* scale, int32_t* sum) {
  // The order of the bits of |x| is that of the numbers, infinities and NaNs being above all others.
  __m512i greatest = _mm512_setzero_si512();
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  for (int32_t i = 0; i < count; i += 16) {
    const __m512i bits = _mm512_maskz_loadu_epi32(first_lanes(count - i), x + i);
    greatest = _mm512_max_epi32(greatest, _mm512_and_si512(bits, magnitude));
  }
  const int32_t bits = _mm512_reduce_max_epi32(greatest);
  float top;
  __builtin_memcpy(&top, &bits, sizeof top);
  float inverse = 0.0f;
  if (bits >= 0x7f800000) {
    *scale = __builtin_nanf("");
  } else if (top < 0x1p-100f) {
    *scale = 0.0f;
  } else {
    *scale = top / 127.0f;
    inverse = 127.0f / top;
  }
  const bool usable = inverse != 0.0f;
  __m512i total = _mm512_setzero_si512();
  for (int32_t i = 0; i < count; i += 16) {
    const __mmask16 some = first_lanes(count - i);
    // Not even NaNs are multiplied where the scale says it all.
    const __m512 v = _mm512_maskz_loadu_ps(usable ? some : 0, x + i);
    const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(v, _mm512_set1_ps(inverse)));
    total = _mm512_add_epi32(total, rounded);
    _mm512_mask_cvtepi32_storeu_epi8(values + i, some, rounded);
  }
  *sum = _mm512_reduce_add_epi32(total);
}

void quantize(const float* x, int32_t columns, int32_t group, int8_t* values, float* scale, int32_t* sums) {
  for (int32_t g = 0, c = 0; c < columns; ++g, c += group)
    quantize_group(x + c, least(group, columns - c), values + c, scale + g, sums + g);
}

void split(const int8_t* values, int64_t count, int8_t* even, int8_t* odd) {
  alignas(64) uint8_t index[64];
  for (int i = 0; i < 64; ++i) index[i] = static_cast<uint8_t>(2 * i);
  const __m512i evens = _mm512_load_si512(index), odds = _mm512_add_epi8(evens, _mm512_set1_epi8(1));
  for (int64_t i = 0; i < count; i += 128) {
    const __m512i a = _mm512_loadu_si512(values + i), b = _mm512_loadu_si512(values + i + 64);
    _mm512_storeu_si512(even + i / 2, _mm512_permutex2var_epi8(a, evens, b));
    _mm512_storeu_si512(odd + i / 2, _mm512_permutex2var_epi8(a, odds, b));
  }
}

// x[i] and x[i ^ half] become their sum and difference, within a register.
INLINE __m512 butterfly(__m512 x, __m512 swapped, __mmask16 upper) {
  return _mm512_mask_sub_ps(_mm512_add_ps(x, swapped), upper, swapped, x);
}

INLINE __m512 within(__m512 x) {
  x = butterfly(x, _mm512_permute_ps(x, 0xb1), 0xaaaa);
  x = butterfly(x, _mm512_permute_ps(x, 0x4e), 0xcccc);
  x = butterfly(x, _mm512_shuffle_f32x4(x, x, 0xb1), 0xf0f0);
  return butterfly(x, _mm512_shuffle_f32x4(x, x, 0x4e), 0xff00);
}

template <int N>
INLINE void across(__m512* v) {
#pragma GCC unroll 4
  for (int half = 1; half < N; half *= 2)
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i)
      if ((i & half) == 0) {
        const __m512 a = v[i], b = v[i + half];
        v[i] = _mm512_add_ps(a, b);
        v[i + half] = _mm512_sub_ps(a, b);
      }
}

// The first stages: signs, then 16 * N neighbours in N registers.
template <int N>
INLINE void neighbours(float* x, const uint8_t* signs, __m512 norm) {
  __m512 v[N];
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) {
    uint16_t minus;
    __builtin_memcpy(&minus, signs + 2 * i, 2);
    const __m512i bits = _mm512_loadu_si512(x + 16 * i);
    v[i] = within(_mm512_castsi512_ps(_mm512_mask_xor_epi32(bits, minus, bits, _mm512_set1_epi32(INT32_MIN))));
  }
  across<N>(v);
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) _mm512_storeu_ps(x + 16 * i, _mm512_mul_ps(v[i], norm));
}

// Later stages: N numbers at distance `stride`, 16 such at a time.
template <int N>
INLINE void strided(float* x, int32_t stride, __m512 norm) {
  for (int32_t j = 0; j < stride; j += 16) {
    __m512 v[N];
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) v[i] = _mm512_loadu_ps(x + i * stride + j);
    across<N>(v);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) _mm512_storeu_ps(x + i * stride + j, _mm512_mul_ps(v[i], norm));
  }
}

void short_block(float* x, int32_t block, int32_t first, const uint8_t* signs, float norm) {
  for (int32_t i = 0; i < block; ++i)
    if (signs[(first + i) / 8] >> (first + i) % 8 & 1) x[i] = -x[i];
  for (int32_t half = 1; half < block; half *= 2)
    for (int32_t i = 0; i < block; ++i)
      if ((i & half) == 0) {
        const float a = x[i], b = x[i + half];
        x[i] = a + b;
        x[i + half] = a - b;
      }
  for (int32_t i = 0; i < block; ++i) x[i] *= norm;
}

void long_block(float* x, int32_t block, const uint8_t* signs, float norm) {
  // Multiplying by one changes nothing, so only the last pass brings in the norm.
  const __m512 one = _mm512_set1_ps(1.0f), last = _mm512_set1_ps(norm);
  int32_t done = least(block, 256);
  for (int32_t i = 0; i < block; i += done) {
    const __m512 factor = done == block ? last : one;
    switch (done) {
      case 16: neighbours<1>(x + i, signs + i / 8, factor); break;
      case 32: neighbours<2>(x + i, signs + i / 8, factor); break;
      case 64: neighbours<4>(x + i, signs + i / 8, factor); break;
      case 128: neighbours<8>(x + i, signs + i / 8, factor); break;
      default: neighbours<16>(x + i, signs + i / 8, factor); break;
    }
  }
  while (done < block) {
    const int32_t step = least(block / done, 16);
    const __m512 factor = done * step == block ? last : one;
    for (int32_t i = 0; i < block; i += done * step) {
      switch (step) {
        case 2: strided<2>(x + i, done, factor); break;
        case 4: strided<4>(x + i, done, factor); break;
        case 8: strided<8>(x + i, done, factor); break;
        default: strided<16>(x + i, done, factor); break;
      }
    }
    done *= step;
  }
}

void rotate(float* values, int32_t columns, int32_t block, const uint8_t* signs) {
  const float norm = 1.0f / __builtin_sqrtf(static_cast<float>(block));
  for (int32_t c = 0; c < columns; c += block) {
    if (block < 16) {
      short_block(values + c, block, c, signs, norm);
    } else {
      long_block(values + c, block, signs + c / 8, norm);
    }
  }
}

void scales(const Weight& weight, int32_t row, int32_t first, int32_t count, float* out) {
  for (int32_t i = 0; i < count; i += 16) {
    const __mmask16 some = first_lanes(count - i);
    _mm512_mask_storeu_ps(out + i, some, load_numbers(weight.scale, weight.scale_type, row * weight.scale_stride + first + i, some));
  }
}

INLINE float sum(__m512 v) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

template <Float TYPE, int TOKENS, int ROWS>
INLINE void plain_rows(const Weight& weight, const Inputs& in, int32_t row, float* outputs) {
  const char* w = static_cast<const char*>(weight.codes) + row * weight.row_bytes;
  __m512 total[ROWS][TOKENS];
  for (auto& line : total)
    for (__m512& v : line) v = _mm512_setzero_ps();
  for (int32_t c = 0; c < in.columns; c += 16) {
    const __mmask16 some = first_lanes(in.columns - c);
    __m512 x[TOKENS];
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t) x[t] = _mm512_maskz_loadu_ps(some, in.exact + static_cast<int64_t>(t) * in.columns + c);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const __m512 v = load_numbers(w + r * weight.row_bytes, TYPE, c, some);
#pragma GCC unroll 8
      // Lanes past the end must keep what they have: 0 * x + -0 would be 0.
      for (int t = 0; t < TOKENS; ++t) total[r][t] = _mm512_mask3_fmadd_ps(v, x[t], total[r][t], some);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int t = 0; t < TOKENS; ++t) outputs[t * in.rows + row + r] = sum(total[r][t]);
}

template <Float TYPE, int TOKENS>
void plain_tokens(const Weight& weight, const Inputs& in, int32_t first, int32_t last, float* outputs) {
  constexpr int ROWS = TOKENS <= 4 ? 4 : 2;
  int32_t row = first;
  for (; row + ROWS <= last; row += ROWS) plain_rows<TYPE, TOKENS, ROWS>(weight, in, row, outputs);
  for (; row < last; ++row) plain_rows<TYPE, TOKENS, 1>(weight, in, row, outputs);
}

template <Float TYPE>
INLINE void plain_type(const Weight& weight, const Inputs& in, int32_t first, int32_t last, float* outputs) {
  switch (in.tokens) {
    case 1: return plain_tokens<TYPE, 1>(weight, in, first, last, outputs);
    case 2: return plain_tokens<TYPE, 2>(weight, in, first, last, outputs);
    case 3: return plain_tokens<TYPE, 3>(weight, in, first, last, outputs);
    case 4: return plain_tokens<TYPE, 4>(weight, in, first, last, outputs);
    case 5: return plain_tokens<TYPE, 5>(weight, in, first, last, outputs);
    case 6: return plain_tokens<TYPE, 6>(weight, in, first, last, outputs);
    case 7: return plain_tokens<TYPE, 7>(weight, in, first, last, outputs);
    default: return plain_tokens<TYPE, 8>(weight, in, first, last, outputs);
  }
}

void plain(const Weight& weight, const Inputs& inputs, int32_t first, int32_t last, float* outputs) {
  if (weight.kind == Kind::bfloat16) return plain_type<Float::bfloat16>(weight, inputs, first, last, outputs);
  return plain_type<Float::float32>(weight, inputs, first, last, outputs);
}

uint64_t read(const void* data, int64_t bytes) {
  const char* p = static_cast<const char*>(data);
  __m512i sum[8];
  for (__m512i& v : sum) v = _mm512_setzero_si512();
  int64_t i = 0;
  for (; i + 512 <= bytes; i += 512)
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      fetch_ahead<2048>(p + i + 64 * j);
      sum[j] = _mm512_add_epi64(sum[j], _mm512_loadu_si512(p + i + 64 * j));
    }
  for (; i < bytes; i += 64) sum[0] = _mm512_add_epi64(sum[0], _mm512_maskz_loadu_epi8(first_bytes(bytes - i), p + i));
  for (int j = 1; j < 8; ++j) sum[0] = _mm512_add_epi64(sum[0], sum[j]);
  alignas(64) uint64_t lanes[8];
  _mm512_store_si512(lanes, sum[0]);
  uint64_t total = 0;
  for (uint64_t lane : lanes) total += lane;  // unsigned, so that it may wrap around
  return total;
}

}  // namespace

const Kernels vectors_avx512 = {
    "avx512", quantize, split, rotate, scales, nullptr, nullptr, nullptr, plain, nullptr,
    nullptr,  nullptr,  0,     nullptr, nullptr, nullptr, read,
};

}  // namespace quern
