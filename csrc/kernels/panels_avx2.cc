// Trellis codes and panels of decoded weights; see trellis_avx512.cc and panels_avx512.cc. A register of a panel is two here:
// rows 0 to 7 and 8 to 15. A table of 64 entries is four of vpshufb, whose right one the bits above the lowest four choose.
#include "kernels/common_avx2.h"
#include "kernels/tables.h"

namespace quern {
namespace {

constexpr int MOST_BYTES = 8, MOST_STEPS = 16;

// 16 entries in each half of a register.
struct Table {
  __m256i parts[8];
};

INLINE Table load_table(const int8_t* entries, int window) {
  Table table;
  for (int i = 0; i < 8; ++i) {
    const int at = window == 7 ? i : i % 4;
    table.parts[i] = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(entries + 16 * at)));
  }
  return table;
}

template <int WINDOW>
INLINE __m256i look_up(const Table& table, __m256i index) {
  // vpshufb takes the lowest four bits where the highest one is clear; vpblendvb chooses by the highest bit.
  const __m256i low = _mm256_and_si256(index, _mm256_set1_epi8(15));
  const __m256i bit4 = _mm256_slli_epi16(index, 3), bit5 = _mm256_slli_epi16(index, 2), bit6 = _mm256_slli_epi16(index, 1);
  __m256i v[8];
  constexpr int parts = 1 << (WINDOW - 4);
#pragma GCC unroll 8
  for (int i = 0; i < parts; ++i) v[i] = _mm256_shuffle_epi8(table.parts[i], low);
#pragma GCC unroll 4
  for (int i = 0; i < parts; i += 2) v[i] = _mm256_blendv_epi8(v[i], v[i + 1], bit4);
#pragma GCC unroll 2
  for (int i = 0; i < parts; i += 4) v[i] = _mm256_blendv_epi8(v[i], v[i + 2], bit5);
  if constexpr (WINDOW == 7) v[0] = _mm256_blendv_epi8(v[0], v[4], bit6);
  return v[0];
}

struct Tile {
  Table tables[2];
  int bits, window, steps, bytes, lag;
  bool two;
  const uint8_t* codes;
};

INLINE Tile tile_of(const Weight& weight, int32_t tile, int32_t block) {
  Tile t;
  const int32_t height = least(weight.rows - tile * TILE_ROWS, TILE_ROWS);
  t.bits = weight.bits;
  t.window = weight.window;
  t.steps = (height + 15) / 16;
  t.bytes = (t.bits * t.steps + 7) / 8;
  t.lag = weight.lag;
  t.two = weight.tables == 2;
  t.tables[0] = load_table(weight.table, t.window);
  t.tables[1] = load_table(weight.table + (t.two ? 1 << t.window : 0), t.window);
  const int64_t blocks = (weight.columns + 3) / 4, whole = 2 * weight.bits;
  t.codes = static_cast<const uint8_t*>(weight.codes) + 64 * (whole * tile * blocks + static_cast<int64_t>(block) * t.bytes);
  return t;
}

INLINE __m256i find(const Tile& t, const __m256i* w, int step, int which) {
  const int start = (t.bits * (step + 1) - t.window + 64 * 8 * t.bytes) % (8 * t.bytes);
  const int byte = start / 8, shift = start % 8, next = byte + 1 == t.bytes ? 0 : byte + 1;
  const __m256i mine = _mm256_set1_epi8(static_cast<char>(0xff >> shift));
  const __m256i right = _mm256_and_si256(_mm256_srl_epi16(w[byte], _mm_cvtsi32_si128(shift)), mine);
  const __m256i left = _mm256_andnot_si256(mine, _mm256_sll_epi16(w[next], _mm_cvtsi32_si128(8 - shift)));
  const __m256i index = _mm256_or_si256(right, left);
  return t.window == 6 ? look_up<6>(t.tables[which], index) : look_up<7>(t.tables[which], index);
}

// Values of half a block, a register a step.
INLINE void values(const Tile& t, const uint8_t* codes, __m256i* out) {
  __m256i w[MOST_BYTES];
  for (int i = 0; i < t.bytes; ++i) w[i] = load(codes + 64 * i);
  for (int step = 0; step < t.steps; ++step) {
    out[step] = find(t, w, t.two ? step : step - t.lag, 0);
    if (t.two) out[step] = _mm256_add_epi8(out[step], find(t, w, step - t.lag, 1));
  }
}

INLINE __m256i four_inputs(const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}

void trellis(const Weight& weight, int32_t tile, int32_t first, int32_t last, const int8_t* x, int32_t* sums) {
  const Tile t = tile_of(weight, tile, first);
  __m256i total[2][MOST_STEPS], value[MOST_STEPS];
  for (auto& half : total)
    for (__m256i& v : half) v = _mm256_setzero_si256();
  for (int32_t b = 0; b < last - first; ++b) {
    const __m256i inputs = four_inputs(x + 4 * static_cast<int64_t>(first + b));
    for (int half = 0; half < 2; ++half) {
      values(t, t.codes + 64 * static_cast<int64_t>(b) * t.bytes + 32 * half, value);
      for (int i = 0; i < t.steps; ++i) total[half][i] = _mm256_add_epi32(total[half][i], products(value[i], inputs));
    }
  }
  for (int i = 0; i < t.steps; ++i)
    for (int half = 0; half < 2; ++half)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + 16 * i + 8 * half), total[half][i]);
}

void decode_trellis(const Weight& weight, const Part& part, uint8_t flip, int8_t* panel) {
  const Tile t = tile_of(weight, part.first_row / TILE_ROWS, part.first_column / 4);
  const __m256i flips = _mm256_set1_epi8(static_cast<char>(flip));
  __m256i value[MOST_STEPS];
  for (int32_t b = 0; b < (part.columns + 3) / 4; ++b)
    for (int half = 0; half < 2; ++half) {
      values(t, t.codes + 64 * static_cast<int64_t>(b) * t.bytes + 32 * half, value);
      for (int i = 0; i < t.steps; ++i)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(panel + (static_cast<int64_t>(i) * part.blocks + b) * LANES + 32 * half),
                            _mm256_xor_si256(value[i], flips));
    }
}

template <int TOKENS>
INLINE void add_panel(const int8_t* w, int32_t blocks, const int8_t* x, int64_t stride, int32_t* sums) {
  __m256i total[TOKENS][2];
  for (int t = 0; t < TOKENS; ++t)
    for (int half = 0; half < 2; ++half) total[t][half] = load(sums + 16 * t + 8 * half);
  for (int32_t b = 0; b < blocks; ++b) {
    const __m256i low = load(w + 64 * static_cast<int64_t>(b)), high = load(w + 64 * static_cast<int64_t>(b) + 32);
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t) {
      const __m256i inputs = four_inputs(x + t * stride + 4 * b);
      total[t][0] = _mm256_add_epi32(total[t][0], products(low, inputs));
      total[t][1] = _mm256_add_epi32(total[t][1], products(high, inputs));
    }
  }
  for (int t = 0; t < TOKENS; ++t)
    for (int half = 0; half < 2; ++half)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + 16 * t + 8 * half), total[t][half]);
}

void panel(const int8_t* panel, int32_t row_groups, int32_t blocks, const int8_t* x, int64_t stride, int32_t tokens,
           int32_t* sums) {
  for (int32_t g = 0; g < row_groups; ++g) {
    const int8_t* w = panel + static_cast<int64_t>(g) * blocks * LANES;
    int32_t* out = sums + static_cast<int64_t>(g) * tokens * 16;
    int32_t t = 0;
    for (; t + 4 <= tokens; t += 4) add_panel<4>(w, blocks, x + t * stride, stride, out + 16 * t);
    for (; t < tokens; ++t) add_panel<1>(w, blocks, x + t * stride, stride, out + 16 * t);
  }
}

void flush(const int32_t* sums, int32_t row_groups, int32_t tokens, const float* ws, const float* xs, const int32_t* xsum,
           int64_t token_stride, int32_t flip, float* out) {
  for (int32_t g = 0; g < row_groups; ++g)
    for (int32_t t = 0; t < tokens; ++t)
      for (int32_t r = 0; r < 16; r += 8) {
        const int64_t at = (static_cast<int64_t>(g) * tokens + t) * 16 + r;
        const __m256i shift = _mm256_mullo_epi32(_mm256_set1_epi32(flip), _mm256_set1_epi32(xsum[t * token_stride]));
        const __m256 value = _mm256_cvtepi32_ps(_mm256_sub_epi32(load(sums + at), shift));
        const __m256 scale = _mm256_mul_ps(_mm256_loadu_ps(ws + 16 * g + r), _mm256_set1_ps(xs[t * token_stride]));
        _mm256_storeu_ps(out + at, _mm256_fmadd_ps(value, scale, _mm256_loadu_ps(out + at)));
      }
}

}  // namespace

const Kernels panels_avx2 = {
    "avx2",  nullptr,        nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, trellis,
    nullptr, decode_trellis, 0,       panel,   flush,   nullptr, nullptr,
};

}  // namespace quern
