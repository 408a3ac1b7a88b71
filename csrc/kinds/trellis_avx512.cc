// Trellis codes. A lane's code stream lies in one byte column of consecutive registers, so a window of a step is a shift of
// one register, or where it straddles two bytes a merge of two (one ternary operation) and a rotation of every byte (one
// affine transform over GF(2)). Looking it up is vpermb (64 entries) or vpermi2b (128), which ignore the bits above the
// window; vpdpbusd then multiplies unsigned values, entry + 128, by four inputs.
//
// Whole tiles and those of 8 steps, which is where heights like 29568, 4864 and 896 end, have code of their own for each
// variant; all else goes through the same operations with the numbers of the variant at run time.
#include "kernels/common_avx512.h"
#include "kinds/kinds.h"

namespace quern {
namespace {

constexpr int MOST_BYTES = 8;   // of a lane's stream: 16 steps of 4 bits

struct Tables {
  __m512i low[2], high[2];  // entries 0-63 and 64-127
};

// Entries of the first table are shifted by `bias`, so that they, or their sums with the second's, are unsigned bytes.
INLINE Tables load_tables(const Weight& weight, char bias) {
  Tables t;
  const __m512i offset = _mm512_set1_epi8(bias);
  for (int i = 0; i < 2; ++i) {
    const int8_t* table = weight.table + (i < weight.tables ? i << weight.window : 0);
    t.low[i] = _mm512_loadu_si512(table);
    t.high[i] = weight.window == 7 ? _mm512_loadu_si512(table + 64) : t.low[i];
  }
  t.low[0] = _mm512_xor_si512(t.low[0], offset);
  t.high[0] = _mm512_xor_si512(t.high[0], offset);
  return t;
}

template <int WINDOW>
INLINE __m512i look_up(const Tables& t, int which, __m512i index) {
  if constexpr (WINDOW == 6) return _mm512_permutexvar_epi8(index, t.low[which]);
  return _mm512_permutex2var_epi8(t.low[which], index, t.high[which]);
}

// Rotates the bits of every byte right by `by`: row i of the matrix picks bit (i + by) % 8 of the input, and rows are
// counted from the highest byte.
constexpr uint64_t rotation(int by) {
  uint64_t matrix = 0;
  for (int i = 0; i < 8; ++i) matrix |= uint64_t{1} << (8 * (7 - i) + (i + by) % 8);
  return matrix;
}

// The window of step `STEP`, which may be below 0, in its low bits; anything above.
template <int BITS, int WINDOW, int STEPS, int STEP>
INLINE __m512i window(const __m512i* w) {
  constexpr int bytes = BITS * STEPS / 8;
  constexpr int start = (BITS * (STEP + 1) - WINDOW + 64 * bytes) % (8 * bytes);
  constexpr int byte = start / 8, shift = start % 8;
  if constexpr (shift == 0) return w[byte];
  if constexpr (shift + WINDOW <= 8) return _mm512_srli_epi16(w[byte], shift);
  const __m512i upper = _mm512_set1_epi8(static_cast<char>(0xff << shift));
  const __m512i merged = _mm512_ternarylogic_epi32(upper, w[byte], w[(byte + 1) % bytes], 0xca);
  return _mm512_gf2p8affine_epi64_epi8(merged, _mm512_set1_epi64(static_cast<int64_t>(rotation(shift))), 0);
}

// What a variant does with the value of each step of a block.
struct Dot {
  __m512i sums[16];
  __m512i x;
  template <int STEP>
  INLINE void take(Dot& self, __m512i value) {
    self.sums[STEP] = _mm512_dpbusd_epi32(self.sums[STEP], value, self.x);
  }
};

struct Store {
  int8_t* panel;
  int64_t step_bytes;
  int lag, steps;
  template <int STEP>
  INLINE void take(Store& self, __m512i value) {
    int to = STEP + self.lag;
    if (to >= self.steps) to -= self.steps;
    _mm512_storeu_si512(self.panel + to * self.step_bytes, value);
  }
};

template <int BITS, int WINDOW, int TABLES, int LAG, int STEPS, int STEP, typename Sink>
INLINE void steps_from(const __m512i* w, const Tables& tables, __m512i* older, Sink& sink) {
  if constexpr (STEP < STEPS) {
    const __m512i index = window<BITS, WINDOW, STEPS, STEP>(w);
    __m512i value = look_up<WINDOW>(tables, 0, index);
    if constexpr (TABLES == 2) {
      // `older` holds the second table's values of the last LAG steps.
      value = _mm512_add_epi8(value, older[STEP % LAG]);
      if constexpr (STEP + LAG < STEPS) older[STEP % LAG] = look_up<WINDOW>(tables, 1, index);
    }
    Sink::template take<STEP>(sink, value);
    steps_from<BITS, WINDOW, TABLES, LAG, STEPS, STEP + 1>(w, tables, older, sink);
  }
}

template <int BITS, int WINDOW, int LAG, int STEPS, int STEP>
INLINE void older_from(const __m512i* w, const Tables& tables, __m512i* older) {
  if constexpr (STEP < LAG) {
    older[STEP] = look_up<WINDOW>(tables, 1, window<BITS, WINDOW, STEPS, STEP - LAG>(w));
    older_from<BITS, WINDOW, LAG, STEPS, STEP + 1>(w, tables, older);
  }
}

template <int BITS, int WINDOW, int TABLES, int LAG, int STEPS, typename Sink>
INLINE void block(const uint8_t* codes, const Tables& tables, Sink& sink) {
  constexpr int bytes = BITS * STEPS / 8;
  __m512i w[bytes], older[LAG > 0 ? LAG : 1];
#pragma GCC unroll 8
  for (int i = 0; i < bytes; ++i) w[i] = _mm512_loadu_si512(codes + 64 * i);
  if constexpr (TABLES == 2) older_from<BITS, WINDOW, LAG, STEPS, 0>(w, tables, older);
  steps_from<BITS, WINDOW, TABLES, LAG, STEPS, 0>(w, tables, older, sink);
}

// A tile's codes from block `first` on.
struct Range {
  const uint8_t* codes;
  int32_t blocks;
  const int8_t* x;
};

template <int BITS, int WINDOW, int TABLES, int LAG, int STEPS>
void dot(const Weight& weight, const Range& range, int32_t* sums) {
  const Tables tables = load_tables(weight, static_cast<char>(-128));
  Dot sink;
#pragma GCC unroll 16
  for (int i = 0; i < STEPS; ++i) sink.sums[i] = _mm512_setzero_si512();
  const uint8_t* codes = range.codes;
  for (int32_t b = 0; b < range.blocks; ++b, codes += 8 * BITS * STEPS) {
    for (int i = 0; i < BITS * STEPS / 8; ++i) fetch_ahead(codes + 64 * i);
    int32_t four;
    __builtin_memcpy(&four, range.x + 4 * b, 4);
    sink.x = _mm512_set1_epi32(four);
    block<BITS, WINDOW, TABLES, LAG, STEPS>(codes, tables, sink);
  }
#pragma GCC unroll 16
  for (int i = 0; i < STEPS; ++i) _mm512_storeu_si512(sums + 16 * i, sink.sums[i]);
}

template <int BITS, int WINDOW, int TABLES, int LAG, int STEPS>
void expand(const Weight& weight, const Range& range, char bias, int8_t* panel, int64_t step_bytes) {
  const Tables tables = load_tables(weight, bias);
  // With one table a lag only moves values to later steps.
  Store sink{panel, step_bytes, TABLES == 1 ? weight.lag % STEPS : 0, STEPS};
  for (int32_t b = 0; b < range.blocks; ++b, sink.panel += 64)
    block<BITS, WINDOW, TABLES, LAG, STEPS>(range.codes + static_cast<int64_t>(b) * 8 * BITS * STEPS, tables, sink);
}

// Any variant and height. The values of one block, a register a step.
struct General {
  Tables tables;
  int bits, width, steps, bytes, lag;
  bool two;

  INLINE General make(const Weight& weight, int32_t height, char bias) {
    General g;
    g.tables = load_tables(weight, bias);
    g.bits = weight.bits;
    g.width = weight.window;
    g.steps = (height + 15) / 16;
    g.bytes = (g.bits * g.steps + 7) / 8;
    g.lag = weight.lag;
    g.two = weight.tables == 2;
    return g;
  }

  INLINE __m512i find(const General& g, const __m512i* w, int step, int which) {
    const int start = (g.bits * (step + 1) - g.width + 64 * g.bytes * 8) % (8 * g.bytes);
    const int byte = start / 8, shift = start % 8;
    const __m512i right = _mm512_srl_epi16(w[byte], _mm_cvtsi32_si128(shift));
    const __m512i left = _mm512_sll_epi16(w[(byte + 1) % g.bytes], _mm_cvtsi32_si128(8 - shift));
    const __m512i mine = _mm512_set1_epi8(static_cast<char>(0xff >> shift));
    const __m512i index = _mm512_ternarylogic_epi32(mine, right, left, 0xca);
    return g.width == 6 ? look_up<6>(g.tables, which, index) : look_up<7>(g.tables, which, index);
  }

  INLINE void values(const General& g, const uint8_t* codes, __m512i* out) {
    __m512i w[MOST_BYTES];
    for (int i = 0; i < g.bytes; ++i) w[i] = _mm512_loadu_si512(codes + 64 * i);
    for (int step = 0; step < g.steps; ++step) {
      out[step] = find(g, w, g.two ? step : step - g.lag, 0);
      if (g.two) out[step] = _mm512_add_epi8(out[step], find(g, w, step - g.lag, 1));
    }
  }
};

void dot_general(const Weight& weight, int32_t height, const Range& range, int32_t* sums) {
  const General g = General::make(weight, height, static_cast<char>(-128));
  __m512i total[16], values[16];
  for (__m512i& v : total) v = _mm512_setzero_si512();
  for (int32_t b = 0; b < range.blocks; ++b) {
    General::values(g, range.codes + static_cast<int64_t>(b) * 64 * g.bytes, values);
    int32_t four;
    __builtin_memcpy(&four, range.x + 4 * b, 4);
    const __m512i x = _mm512_set1_epi32(four);
    for (int i = 0; i < g.steps; ++i) total[i] = _mm512_dpbusd_epi32(total[i], values[i], x);
  }
  for (int i = 0; i < g.steps; ++i) _mm512_storeu_si512(sums + 16 * i, total[i]);
}

void expand_general(const Weight& weight, int32_t height, const Range& range, char bias, int8_t* panel,
                    int64_t step_bytes) {
  const General g = General::make(weight, height, bias);
  __m512i values[16];
  for (int32_t b = 0; b < range.blocks; ++b) {
    General::values(g, range.codes + static_cast<int64_t>(b) * 64 * g.bytes, values);
    for (int i = 0; i < g.steps; ++i) _mm512_storeu_si512(panel + i * step_bytes + 64 * b, values[i]);
  }
}

using DotFunction = void (*)(const Weight&, const Range&, int32_t*);
using ExpandFunction = void (*)(const Weight&, const Range&, char, int8_t*, int64_t);

struct Variant {
  int bits, window, tables, lag, steps;
  DotFunction dot;
  ExpandFunction expand;
};

#define ONE(BITS, WINDOW, TABLES, LAG, STEPS) \
  {BITS, WINDOW, TABLES, LAG, STEPS, dot<BITS, WINDOW, TABLES, LAG, STEPS>, expand<BITS, WINDOW, TABLES, LAG, STEPS>}
#define HEIGHTS(BITS, WINDOW, TABLES, LAG) ONE(BITS, WINDOW, TABLES, LAG, 16), ONE(BITS, WINDOW, TABLES, LAG, 8)
#define WINDOWS(BITS, TABLES, LAG) HEIGHTS(BITS, 6, TABLES, LAG), HEIGHTS(BITS, 7, TABLES, LAG)

constexpr Variant VARIANTS[] = {
    WINDOWS(2, 1, 0), WINDOWS(2, 2, 1), WINDOWS(2, 2, 2), WINDOWS(2, 2, 3), WINDOWS(2, 2, 4), WINDOWS(3, 1, 0), WINDOWS(3, 2, 1),
    WINDOWS(3, 2, 2), WINDOWS(4, 1, 0), WINDOWS(4, 2, 1), WINDOWS(4, 2, 2),
};

const Variant* find(const Weight& weight, int steps) {
  for (const Variant& v : VARIANTS)
    if (v.bits == weight.bits && v.window == weight.window && v.tables == weight.tables &&
        (v.tables == 1 || v.lag == weight.lag) && v.steps == steps)
      return &v;
  return nullptr;
}

INLINE int32_t height_of(const Weight& weight, int32_t tile) {
  const int32_t rest = weight.rows - tile * TILE_ROWS;
  return rest < TILE_ROWS ? rest : TILE_ROWS;
}

INLINE const uint8_t* codes_of(const Weight& weight, int32_t tile, int32_t block) {
  const int64_t blocks = (weight.columns + 3) / 4;
  const int32_t steps = (height_of(weight, tile) + 15) / 16;
  const int32_t bytes = (weight.bits * steps + 7) / 8;
  return static_cast<const uint8_t*>(weight.codes) + 64 * (2 * weight.bits * tile * blocks + static_cast<int64_t>(block) * bytes);
}

// Every sum above is too great by 128 for each input.
void subtract_bias(const int8_t* x, int32_t count, int32_t* sums, int32_t steps) {
  __m512i total = _mm512_setzero_si512();
  const __m512i bias = _mm512_set1_epi8(static_cast<char>(-128));
  for (int32_t i = 0; i < count; i += 64) {
    const int32_t rest = count - i;
    total = _mm512_dpbusd_epi32(total, bias, _mm512_maskz_loadu_epi8(first_bytes(rest), x + i));
  }
  const __m512i all = _mm512_set1_epi32(_mm512_reduce_add_epi32(total));
  for (int32_t i = 0; i < steps; ++i)
    _mm512_storeu_si512(sums + 16 * i, _mm512_sub_epi32(_mm512_loadu_si512(sums + 16 * i), all));
}

// With one table a lag only moves sums to later steps.
void move_steps(int32_t* sums, int32_t steps, int32_t lag) {
  __m512i moved[16];
  for (int32_t i = 0; i < steps; ++i) moved[(i + lag) % steps] = _mm512_loadu_si512(sums + 16 * i);
  for (int32_t i = 0; i < steps; ++i) _mm512_storeu_si512(sums + 16 * i, moved[i]);
}

void multiply_tile(const Weight& weight, int32_t tile, int32_t first, int32_t last, const int8_t* x, int32_t* sums) {
  const int32_t height = height_of(weight, tile), steps = (height + 15) / 16;
  const Range range{codes_of(weight, tile, first), last - first, x + 4 * first};
  if (const Variant* variant = find(weight, steps)) {
    variant->dot(weight, range, sums);
    if (weight.tables == 1 && weight.lag > 0) move_steps(sums, steps, weight.lag);
  } else {
    dot_general(weight, height, range, sums);
  }
  subtract_bias(range.x, 4 * range.blocks, sums, steps);
}

void decode_panel(const Weight& weight, const Part& part, uint8_t flip, int8_t* panel) {
  const int32_t tile = part.first_row / TILE_ROWS, height = height_of(weight, tile);
  const Range range{codes_of(weight, tile, part.first_column / 4), (part.columns + 3) / 4, nullptr};
  const char bias = static_cast<char>(flip);
  if (const Variant* variant = find(weight, (height + 15) / 16)) {
    variant->expand(weight, range, bias, panel, 64 * static_cast<int64_t>(part.blocks));
  } else {
    expand_general(weight, height, range, bias, panel, 64 * static_cast<int64_t>(part.blocks));
  }
}

}  // namespace

const KindKernels trellis_avx512 = {nullptr, multiply_tile, decode_panel};

}  // namespace quern
