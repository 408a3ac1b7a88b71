// Panels of decoded weights times many tokens with Intel's matrix tiles (AMX). A tile holds 16 rows of 64 bytes: 16 tokens x
// 64 columns of inputs as they lie in memory, or 16 registers of a panel (64 columns x 16 rows, four columns a lane), which
// is exactly the order that tdpbssd wants. Both operands are signed, so nothing is shifted.
//
// Sums of a whole row: 2 x 2 tiles of sums, so that each tile that is loaded is used twice. Groups with their own scales:
// four groups of one tile are multiplied while the four before them are converted and added to 16 registers of floats. A
// tile that has just been stored cannot be loaded before the store has left the core; hence so many. Groups of 128 are long
// enough for 2 x 2 tiles of sums of one group, whose outputs then no longer fit registers.
#include "kernels/common_avx512.h"
#include "kernels/tables.h"

namespace quern {
namespace {

constexpr int32_t M = 16;      // tokens, and rows, of a tile
constexpr int32_t STEP = 16;   // registers of a panel, or 64 columns, of a tile
constexpr int32_t TILE = M * 16;  // sums
constexpr int32_t DEPTH = 4;
constexpr int32_t TOGETHER = 32;

// Layout that ldtilecfg reads (Intel SDM, palette 1).
struct alignas(64) Shapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Sums: tiles 0 and 1 (first tokens), 2 and 3 (second); inputs: 4 and 5; weights: 6 and 7. `registers` of a panel a tile.
void configure(int32_t first_tokens, int32_t second_tokens, int32_t registers) {
  Shapes shapes;
  const auto set = [&](int tile, int32_t rows, int32_t bytes) {
    shapes.rows[tile] = static_cast<uint8_t>(rows);
    shapes.row_bytes[tile] = static_cast<uint16_t>(rows > 0 ? bytes : 0);
  };
  set(0, first_tokens, 64);
  set(1, first_tokens, 64);
  set(2, second_tokens, 64);
  set(3, second_tokens, 64);
  set(4, first_tokens, 4 * registers);
  set(5, second_tokens, 4 * registers);
  set(6, registers, 64);
  set(7, registers, 64);
  // The header does not tell the compiler that all of the structure is read.
  asm volatile("" : : "r"(&shapes) : "memory");
  _tile_loadconfig(&shapes);
}

// sums (16 tokens each) += `steps` tiles of inputs and weights. TWO_TOKENS, TWO_ROWS: whether the second ones are there.
template <bool TWO_TOKENS, bool TWO_ROWS>
INLINE void add_tiles(const int8_t* w0, const int8_t* w1, const int8_t* x0, const int8_t* x1, int64_t stride, int32_t steps,
                      int32_t* s0, int32_t* s1) {
  int32_t* const t0 = s0 + M * 16;
  int32_t* const t1 = s1 + M * 16;
  _tile_loadd(0, s0, 64);
  if (TWO_ROWS) _tile_loadd(1, s1, 64);
  if (TWO_TOKENS) _tile_loadd(2, t0, 64);
  if (TWO_TOKENS && TWO_ROWS) _tile_loadd(3, t1, 64);
  for (int32_t k = 0; k < steps; ++k) {
    _tile_loadd(4, x0 + 64 * k, stride);
    _tile_loadd(6, w0 + 64 * STEP * k, 64);
    _tile_dpbssd(0, 4, 6);
    if (TWO_ROWS) {
      _tile_loadd(7, w1 + 64 * STEP * k, 64);
      _tile_dpbssd(1, 4, 7);
    }
    if (TWO_TOKENS) {
      _tile_loadd(5, x1 + 64 * k, stride);
      _tile_dpbssd(2, 5, 6);
      if (TWO_ROWS) _tile_dpbssd(3, 5, 7);
    }
  }
  _tile_stored(0, s0, 64);
  if (TWO_ROWS) _tile_stored(1, s1, 64);
  if (TWO_TOKENS) _tile_stored(2, t0, 64);
  if (TWO_TOKENS && TWO_ROWS) _tile_stored(3, t1, 64);
}

template <bool TWO_TOKENS>
INLINE void add_rows(const int8_t* panel, int32_t row_groups, int32_t blocks, int32_t first, int32_t steps, const int8_t* x,
                     int64_t stride, int32_t token, int32_t tokens, int32_t* sums) {
  const int64_t row_group_bytes = static_cast<int64_t>(blocks) * LANES, next = static_cast<int64_t>(tokens) * 16;
  const int8_t* x0 = x + token * stride + 4 * first;
  const int8_t* x1 = x0 + M * stride;
  for (int32_t r = 0; r < row_groups; r += 2) {
    const int8_t* w = panel + r * row_group_bytes + static_cast<int64_t>(first) * LANES;
    int32_t* s = sums + (static_cast<int64_t>(r) * tokens + token) * 16;
    if (r + 1 < row_groups) {
      add_tiles<TWO_TOKENS, true>(w, w + row_group_bytes, x0, x1, stride, steps, s, s + next);
    } else {
      add_tiles<TWO_TOKENS, false>(w, w, x0, x1, stride, steps, s, s);
    }
  }
}

void panel(const int8_t* panel, int32_t row_groups, int32_t blocks, const int8_t* x, int64_t stride, int32_t tokens,
           int32_t* sums) {
  const int32_t rest = blocks % STEP;
  for (int32_t t = 0; t < tokens; t += 2 * M) {
    const int32_t first = least(tokens - t, M), second = least(tokens - t - first, M);
    const auto add = [&](int32_t from, int32_t registers, int32_t steps) {
      configure(first, second, registers);
      if (second > 0) {
        add_rows<true>(panel, row_groups, blocks, from, steps, x, stride, t, tokens, sums);
      } else {
        add_rows<false>(panel, row_groups, blocks, from, steps, x, stride, t, tokens, sums);
      }
    };
    if (blocks >= STEP) add(0, STEP, blocks / STEP);
    if (rest > 0) add(blocks - rest, rest, 1);
  }
  _tile_release();
}

struct Groups {
  const int8_t* panel;
  int32_t blocks;
  const int8_t* x;
  int64_t stride;
  int32_t tokens;
  int32_t registers, steps;  // registers a tile, tiles a group
  const float* ws;
  const float* xs;
  int64_t token_stride;
  float* out;
};

// Up to DEPTH groups of one tile of sums: 16 rows x some tokens.
struct Unit {
  int32_t row_group, token, group, groups;
};

// Sums of group `i` of a unit into tile `i`. The compiler's header takes the numbers of tiles as text.
INLINE void multiply_group(const Groups& in, const Unit& unit, int32_t i) {
  const int64_t first = static_cast<int64_t>(unit.group + i) * in.steps * in.registers;
  const int8_t* w = in.panel + (static_cast<int64_t>(unit.row_group) * in.blocks + first) * LANES;
  const int8_t* x = in.x + unit.token * in.stride + 4 * first;
  const int64_t w_step = static_cast<int64_t>(in.registers) * LANES, x_step = 4 * static_cast<int64_t>(in.registers);
#define MULTIPLY(SUMS, INPUTS, WEIGHTS)          \
  _tile_zero(SUMS);                              \
  for (int32_t k = 0; k < in.steps; ++k) {       \
    _tile_loadd(INPUTS, x + k * x_step, in.stride); \
    _tile_loadd(WEIGHTS, w + k * w_step, 64);    \
    _tile_dpbssd(SUMS, INPUTS, WEIGHTS);         \
  }                                              \
  break
  switch (i) {
    case 0: MULTIPLY(0, 4, 6);
    case 1: MULTIPLY(1, 5, 7);
    case 2: MULTIPLY(2, 4, 6);
    default: MULTIPLY(3, 5, 7);
  }
#undef MULTIPLY
}

INLINE void store_group(int32_t i, int32_t* sums) {
  switch (i) {
    case 0: _tile_stored(0, sums, 64); break;
    case 1: _tile_stored(1, sums + TILE, 64); break;
    case 2: _tile_stored(2, sums + 2 * TILE, 64); break;
    default: _tile_stored(3, sums + 3 * TILE, 64); break;
  }
}

// Sums of tokens [FIRST, LAST) of group `i` of a unit, scaled, are added to `out`.
template <int FIRST, int LAST>
INLINE void scale_group(const Groups& in, const Unit& unit, int32_t i, const int32_t* sums, __m512* out) {
  const __m512 ws = _mm512_loadu_ps(in.ws + static_cast<int64_t>(unit.group + i) * TILE_ROWS + 16 * unit.row_group);
  const float* xs = in.xs + unit.token * in.token_stride + unit.group + i;
#pragma GCC unroll 16
  for (int t = FIRST; t < LAST; ++t) {
    const __m512 scale = _mm512_mul_ps(ws, _mm512_set1_ps(xs[t * in.token_stride]));
    out[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums + i * TILE + 16 * t)), scale, out[t]);
  }
}

INLINE float* outputs_of(const Groups& in, const Unit& unit) {
  return in.out + (static_cast<int64_t>(unit.row_group) * in.tokens + unit.token) * 16;
}

// Multiply `next` while scaling `last`, in turns of half a group, so that both fit into what the core reorders. A tile is
// stored when the next one is under way: its sums are ready then. The last one of `next` is left to the next call.
void add_units(const Groups& in, const Unit& next, int32_t* next_sums, const Unit& last, int32_t* last_sums) {
  float* to = outputs_of(in, last);
  __m512 out[M];
#pragma GCC unroll 16
  for (int t = 0; t < M; ++t) out[t] = _mm512_loadu_ps(to + 16 * t);
  if (last.groups < DEPTH) store_group(last.groups - 1, last_sums);
#pragma GCC unroll 4
  for (int32_t g = 0; g < DEPTH; ++g) {
    if (g < next.groups) multiply_group(in, next, g);
    if (g < last.groups) scale_group<0, M / 2>(in, last, g, last_sums, out);
    if (g == 0 && last.groups == DEPTH) store_group(DEPTH - 1, last_sums);
    if (g > 0 && g < next.groups) store_group(g - 1, next_sums);
    if (g < last.groups) scale_group<M / 2, M>(in, last, g, last_sums, out);
  }
#pragma GCC unroll 16
  for (int t = 0; t < M; ++t) _mm512_storeu_ps(to + 16 * t, out[t]);
}

void multiply_unit(const Groups& in, const Unit& unit, int32_t* sums) {
  for (int32_t g = 0; g < unit.groups; ++g) {
    multiply_group(in, unit, g);
    store_group(g, sums);
  }
}

void scale_unit(const Groups& in, const Unit& unit, int32_t tokens, const int32_t* sums) {
  float* to = outputs_of(in, unit);
  for (int32_t t = 0; t < tokens; ++t) {
    __m512 out = _mm512_loadu_ps(to + 16 * t);
    Groups one = in;
    one.xs += t * in.token_stride;
    for (int32_t g = 0; g < unit.groups; ++g) scale_group<0, 1>(one, unit, g, sums + 16 * t, &out);
    _mm512_storeu_ps(to + 16 * t, out);
  }
}

// Tokens [first, last): whole tiles, or fewer than a tile has.
void add_tokens(const Groups& in, int32_t row_groups, int32_t groups, int32_t first, int32_t last) {
  if (first == last) return;
  const int32_t count = least(last - first, M);
  configure(count, count, in.registers);
  alignas(64) int32_t sums[2][DEPTH * TILE];
  Unit before{};
  int turn = 0;
  for (int32_t r = 0; r < row_groups; ++r)
    for (int32_t t = first; t < last; t += M)
      for (int32_t g = 0; g < groups; g += DEPTH, turn ^= 1) {
        const Unit unit{r, t, g, least(groups - g, DEPTH)};
        if (before.groups > 0) {
          add_units(in, unit, sums[turn], before, sums[turn ^ 1]);
        } else {
          multiply_unit(in, unit, sums[turn]);
        }
        if (count == M) {
          before = unit;
        } else {
          scale_unit(in, unit, count, sums[turn]);
        }
      }
  if (before.groups == 0) return;
  store_group(before.groups - 1, sums[turn ^ 1]);
  scale_unit(in, before, M, sums[turn ^ 1]);
}

constexpr int QUAD_STEPS = 2;  // tiles of a group of 128

// 2 x 2 tiles of sums of one group: two row groups, two times 16 tokens.
struct Quad {
  int32_t row_group, token, group;
};

// Sums of one tile of a quad, scaled, are added to the outputs.
INLINE void scale_tile(const Groups& in, const Quad& quad, int which, const int32_t* sums) {
  const int32_t row_group = quad.row_group + which % 2, token = quad.token + which / 2 * M;
  float* out = in.out + (static_cast<int64_t>(row_group) * in.tokens + token) * 16;
  const __m512 ws = _mm512_loadu_ps(in.ws + static_cast<int64_t>(quad.group) * TILE_ROWS + 16 * row_group);
  const float* xs = in.xs + token * in.token_stride + quad.group;
  sums += which * TILE;
#pragma GCC unroll 16
  for (int t = 0; t < M; ++t) {
    const __m512 scale = _mm512_mul_ps(ws, _mm512_set1_ps(xs[t * in.token_stride]));
    const __m512 value = _mm512_cvtepi32_ps(_mm512_load_si512(sums + 16 * t));
    _mm512_storeu_ps(out + 16 * t, _mm512_fmadd_ps(value, scale, _mm512_loadu_ps(out + 16 * t)));
  }
}

// Multiply the group of `next` while scaling that of `last`, a tile of it after every other product.
template <bool FIRST>
INLINE void add_quad(const Groups& in, const Quad& next, int32_t* next_sums, const Quad& last, const int32_t* last_sums) {
  const int64_t first = static_cast<int64_t>(next.group) * QUAD_STEPS * STEP;
  const int64_t row_group = static_cast<int64_t>(in.blocks) * LANES;
  const int8_t* w = in.panel + next.row_group * row_group + first * LANES;
  const int8_t* x = in.x + next.token * in.stride + 4 * first;
  const auto scale = [&](int product) {
    if (!FIRST && product % QUAD_STEPS == 0) scale_tile(in, last, product / QUAD_STEPS, last_sums);
  };
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
#pragma GCC unroll 2
  for (int k = 0; k < QUAD_STEPS; ++k) {
    _tile_loadd(4, x + 64 * k, in.stride);
    _tile_loadd(6, w + 64 * STEP * k, 64);
    _tile_dpbssd(0, 4, 6);
    scale(4 * k);
    _tile_loadd(7, w + row_group + 64 * STEP * k, 64);
    _tile_dpbssd(1, 4, 7);
    scale(4 * k + 1);
    _tile_loadd(5, x + M * in.stride + 64 * k, in.stride);
    _tile_dpbssd(2, 5, 6);
    scale(4 * k + 2);
    _tile_dpbssd(3, 5, 7);
    scale(4 * k + 3);
  }
  _tile_stored(0, next_sums, 64);
  _tile_stored(1, next_sums + TILE, 64);
  _tile_stored(2, next_sums + 2 * TILE, 64);
  _tile_stored(3, next_sums + 3 * TILE, 64);
}

// 2 * M tokens from `token` on and pairs of row groups.
void add_quads(const Groups& in, int32_t row_groups, int32_t groups, int32_t token) {
  configure(M, M, STEP);
  alignas(64) int32_t sums[2][4 * TILE];
  Quad last{};
  int turn = 0;
  for (int32_t r = 0; r + 2 <= row_groups; r += 2)
    for (int32_t g = 0; g < groups; ++g, turn ^= 1) {
      const Quad next{r, token, g};
      if (r == 0 && g == 0) {
        add_quad<true>(in, next, sums[turn], last, nullptr);
      } else {
        add_quad<false>(in, next, sums[turn], last, sums[turn ^ 1]);
      }
      last = next;
    }
  for (int which = 0; which < 4; ++which) scale_tile(in, last, which, sums[turn ^ 1]);
}

void grouped(const int8_t* panel, int32_t row_groups, int32_t blocks, int32_t group, int32_t groups, const int8_t* x,
             int64_t stride, int32_t tokens, const float* ws, const float* xs, const int32_t*, int64_t token_stride,
             float* out) {
  const int32_t registers = group % 64 == 0 ? STEP : group % 32 == 0 ? STEP / 2 : STEP / 4;
  const Groups in = {panel, blocks, x, stride, tokens, registers, group / (4 * registers), ws, xs, token_stride, out};
  // Inputs of some tokens stay in the L1 cache while rows go by, and 16 rows while these tokens do.
  for (int32_t block = 0; block < tokens; block += TOGETHER) {
    const int32_t end = least(tokens, block + TOGETHER), whole = end - (end - block) % M;
    if (end - block == 2 * M && row_groups % 2 == 0 && group == 64 * QUAD_STEPS) {
      add_quads(in, row_groups, groups, block);
    } else {
      add_tokens(in, row_groups, groups, block, whole);
      add_tokens(in, row_groups, groups, whole, end);
    }
  }
  _tile_release();
}

}  // namespace

const Kernels panels_amx = {
    "amx", nullptr, nullptr, nullptr, nullptr, 0, panel, nullptr, grouped, nullptr, nullptr,
};

}  // namespace quern
