// Trellis codes; the layout is in kernels/weight.h. A register of 64 bytes is four here, of four rows and four columns each. A window
// of six bits is one TBL over four registers, one of seven a TBX behind it.
#include "kernels/common_neon.h"
#include "kinds/kinds.h"

namespace quern {
namespace {

constexpr int32_t MOST_STEPS = 16;

// Where step `t` finds its window in the bytes of a lane.
struct Place {
  int32_t byte, next;
  int8x16_t right, left;  // by so many bits, as VSHL has it
};

struct Tile {
  const uint8_t* codes;  // of block 0
  int32_t steps, registers;
  uint8x16_t mask;
  bool wide;
  Place places[2][MOST_STEPS];  // for both tables
  int8x16x4_t entries[2][2];

  Tile(const Weight& weight, int32_t tile) {
    const int32_t height = least(weight.rows - tile * TILE_ROWS, TILE_ROWS);
    const int64_t blocks = (weight.columns + 3) / 4, all = (weight.bits * 16 + 7) / 8;
    steps = (height + 15) / 16;
    registers = (weight.bits * steps + 7) / 8;
    codes = static_cast<const uint8_t*>(weight.codes) + LANES * tile * blocks * all;
    mask = vdupq_n_u8(static_cast<uint8_t>((1 << weight.window) - 1));
    wide = weight.window == 7;
    const int32_t bits = 8 * registers;
    for (int table = 0; table < weight.tables; ++table) {
      const int32_t lag = table + 1 == weight.tables ? weight.lag : 0;
      for (int32_t step = 0; step < steps; ++step) {
        const int32_t first = ((weight.bits * (step - lag + 1) - weight.window) % bits + bits) % bits, shift = first % 8;
        const int32_t byte = first / 8;
        places[table][step] = {byte, 8 * byte + 8 == bits ? 0 : byte + 1, vdupq_n_s8(static_cast<int8_t>(-shift)),
                               vdupq_n_s8(static_cast<int8_t>(8 - shift))};
      }
      for (int half = 0; half <= wide; ++half)
        for (int i = 0; i < 4; ++i)
          entries[table][half].val[i] = vld1q_s8(weight.table + (table << weight.window) + 64 * half + 16 * i);
    }
  }

  // Values of one table at a step, of the 16 lanes from `at` on, in block `block`.
  INLINE int8x16_t look_up(const Tile& t, int table, int32_t step, int32_t block, int32_t at) {
    const Place& place = t.places[table][step];
    const uint8_t* bytes = t.codes + LANES * (static_cast<int64_t>(block) * t.registers) + at;
    const uint8x16_t low = vshlq_u8(load_bytes(bytes + LANES * place.byte), place.right);
    const uint8x16_t high = vshlq_u8(load_bytes(bytes + LANES * place.next), place.left);
    const uint8x16_t index = vandq_u8(vorrq_u8(low, high), t.mask);
    const int8x16_t found = vqtbl4q_s8(t.entries[table][0], index);
    return t.wide ? vqtbx4q_s8(found, t.entries[table][1], vsubq_u8(index, vdupq_n_u8(64))) : found;
  }

  INLINE int8x16_t values(const Tile& t, int32_t tables, int32_t step, int32_t block, int32_t at) {
    const int8x16_t first = look_up(t, 0, step, block, at);
    return tables == 2 ? vaddq_s8(first, look_up(t, 1, step, block, at)) : first;
  }
};

// SIDE steps at a time, whose sums stay in registers.
template <int SIDE>
INLINE void add_steps(const Tile& tile, int32_t tables, int32_t step, int32_t first, int32_t last, const int8_t* x, int32_t* sums) {
  for (int32_t part = 0; part < 4; ++part) {
    int32x4_t total[SIDE];
    for (int32x4_t& each : total) each = vdupq_n_s32(0);
    for (int32_t block = first; block < last; ++block) {
      int32_t four;
      __builtin_memcpy(&four, x + 4 * static_cast<int64_t>(block), 4);
      const int8x16_t inputs = vreinterpretq_s8_s32(vdupq_n_s32(four));
#pragma GCC unroll 8
      for (int i = 0; i < SIDE; ++i) total[i] = vdotq_s32(total[i], Tile::values(tile, tables, step + i, block, 16 * part), inputs);
    }
    for (int i = 0; i < SIDE; ++i) vst1q_s32(sums + 16 * (step + i) + 4 * part, total[i]);
  }
}

// The window of a step of a whole tile, whose shifts are then known: the registers of a block's 16 lanes are `bytes`.
template <int BITS, int WINDOW, int STEP>
INLINE uint8x16_t window_at(const uint8x16_t* bytes) {
  constexpr int ALL = MOST_STEPS * BITS, FIRST = (BITS * (STEP + 1) - WINDOW + ALL) % ALL, BYTE = FIRST / 8, SHIFT = FIRST % 8;
  constexpr int NEXT = 8 * BYTE + 8 == ALL ? 0 : BYTE + 1;
  uint8x16_t index = bytes[BYTE];
  if constexpr (SHIFT > 0) index = vshrq_n_u8(index, SHIFT);
  if constexpr (8 - SHIFT < WINDOW) index = vsliq_n_u8(index, bytes[NEXT], 8 - SHIFT);
  if constexpr (8 - SHIFT != WINDOW) index = vandq_u8(index, vdupq_n_u8((1 << WINDOW) - 1));
  return index;
}

// total[i] += values of step FIRST + i times inputs, for i from I on.
template <int BITS, int WINDOW, int FIRST, int I = 0>
INLINE void add_windows(const Tile& tile, const uint8x16_t* bytes, int8x16_t inputs, int32x4_t* total) {
  if constexpr (I < 8) {
    const uint8x16_t index = window_at<BITS, WINDOW, FIRST + I>(bytes);
    int8x16_t values = vqtbl4q_s8(tile.entries[0][0], index);
    if constexpr (WINDOW == 7) values = vqtbx4q_s8(values, tile.entries[0][1], vsubq_u8(index, vdupq_n_u8(64)));
    total[I] = vdotq_s32(total[I], values, inputs);
    add_windows<BITS, WINDOW, FIRST, I + 1>(tile, bytes, inputs, total);
  }
}

template <int BITS, int WINDOW, int FIRST>
INLINE void add_half(const Tile& tile, int32_t part, int32_t first, int32_t last, const int8_t* x, int32_t* sums) {
  int32x4_t total[8];
  for (int32x4_t& each : total) each = vdupq_n_s32(0);
  const uint8_t* from = tile.codes + LANES * 2 * BITS * static_cast<int64_t>(first) + REGISTER * part;
  for (int32_t block = first; block < last; ++block, from += LANES * 2 * BITS) {
    uint8x16_t bytes[2 * BITS];
#pragma GCC unroll 8
    for (int i = 0; i < 2 * BITS; ++i) bytes[i] = load_bytes(from + LANES * i);
    int32_t four;
    __builtin_memcpy(&four, x + 4 * static_cast<int64_t>(block), 4);
    add_windows<BITS, WINDOW, FIRST>(tile, bytes, vreinterpretq_s8_s32(vdupq_n_s32(four)), total);
  }
  for (int i = 0; i < 8; ++i) vst1q_s32(sums + 16 * (FIRST + i) + 4 * part, total[i]);
}

// A whole tile of one table without a lag.
template <int BITS, int WINDOW>
void add_tile(const Tile& tile, int32_t first, int32_t last, const int8_t* x, int32_t* sums) {
  for (int32_t part = 0; part < 4; ++part) {
    add_half<BITS, WINDOW, 0>(tile, part, first, last, x, sums);
    add_half<BITS, WINDOW, 8>(tile, part, first, last, x, sums);
  }
}

void multiply_tile(const Weight& weight, int32_t tile, int32_t first, int32_t last, const int8_t* x, int32_t* sums) {
  const Tile t(weight, tile);
  if (t.steps == MOST_STEPS && weight.tables == 1 && weight.lag == 0) {
    switch (10 * weight.bits + weight.window) {
      case 26: return add_tile<2, 6>(t, first, last, x, sums);
      case 27: return add_tile<2, 7>(t, first, last, x, sums);
      case 36: return add_tile<3, 6>(t, first, last, x, sums);
      case 37: return add_tile<3, 7>(t, first, last, x, sums);
      case 46: return add_tile<4, 6>(t, first, last, x, sums);
      case 47: return add_tile<4, 7>(t, first, last, x, sums);
    }
  }
  int32_t step = 0;
  for (; step + 8 <= t.steps; step += 8) add_steps<8>(t, weight.tables, step, first, last, x, sums);
  for (; step < t.steps; ++step) add_steps<1>(t, weight.tables, step, first, last, x, sums);
}

void decode_panel(const Weight& weight, const Part& part, uint8_t flip, int8_t* panel) {
  if (flip != 0) return trellis.kernels[0]->panel(weight, part, flip, panel);
  const Tile t(weight, part.first_row / TILE_ROWS);
  const int32_t first = part.first_column / 4;
  for (int32_t step = 0; step < t.steps; ++step)
    for (int32_t block = 0; block < (part.columns + 3) / 4; ++block) {
      int8_t* to = panel + (step * static_cast<int64_t>(part.blocks) + block) * LANES;
      for (int32_t at = 0; at < LANES; at += REGISTER)
        vst1q_s8(to + at, Tile::values(t, weight.tables, step, first + block, at));
    }
}

}  // namespace

const KindKernels trellis_neon = {nullptr, multiply_tile, decode_panel};

}  // namespace quern
