// Quantizing, rotating, scales and reading.
#include "kernels/common_avx512.h"
#include "kernels/tables.h"

namespace quern {
namespace {

INLINE void quantize_group(const float* x, int32_t count, float given, int8_t* values, float* scale, int32_t* sum) {
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
  } else if (given != 0.0f) {
    *scale = given;
    inverse = 1.0f / given;
  } else if (top < 0x1p-100f) {
    *scale = 0.0f;
  } else {
    *scale = top / 127.0f;
    inverse = 127.0f / top;
  }
  const bool usable = inverse != 0.0f;
  const __m512 least_value = _mm512_set1_ps(-127.0f), greatest_value = _mm512_set1_ps(127.0f);
  __m512i total = _mm512_setzero_si512();
  for (int32_t i = 0; i < count; i += 16) {
    const __mmask16 some = first_lanes(count - i);
    // Not even NaNs are multiplied where the scale says it all.
    const __m512 v = _mm512_maskz_loadu_ps(usable ? some : 0, x + i);
    const __m512 scaled = _mm512_mul_ps(v, _mm512_set1_ps(inverse));
    const __m512i rounded = _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(scaled, least_value), greatest_value));
    total = _mm512_add_epi32(total, rounded);
    _mm512_mask_cvtepi32_storeu_epi8(values + i, some, rounded);
  }
  *sum = _mm512_reduce_add_epi32(total);
}

void quantize(const float* x, int32_t columns, int32_t group, float given, int8_t* values, float* scale, int32_t* sums) {
  for (int32_t g = 0, c = 0; c < columns; ++g, c += group)
    quantize_group(x + c, least(group, columns - c), given, values + c, scale + g, sums + g);
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
    _mm512_mask_storeu_ps(out + i, some, load_scales(weight, row, first + i, some));
  }
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
    "avx512", quantize, split, rotate, scales, 0, nullptr, nullptr, nullptr, nullptr, read,
};

}  // namespace quern
