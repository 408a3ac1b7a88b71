// Trellis codes; see trellis_avx512.cc. A register is half as wide: rows 0 to 7 or 8 to 15 of each step.
//
// vpshufb looks up 16 entries by four bits, and gives zero where the highest bit of a byte is set. Which four bits of a window these
// are is free, as tables can be laid out by it. A fifth bit makes a pair of lookups one of 32 entries: it comes to lie so that the
// second index has its highest bit set, or not, and that lookup is xored to the first. What bits are left choose by vpblendvb,
// which goes by the highest bit of a byte and ignores the others.
//
// 32 weights take about 10 operations at a window of 6 and 20 at one of 7, and multiplying 3 more.
//
// Some blocks are taken together, step by step: what a step needs then stays in registers, and the blocks in the L1 cache. Two
// tables are two products.
#include "kernels/fitting_avx2-inl.h"
#include "kinds/kinds.h"

namespace quern {
namespace {

constexpr int MOST_STEPS = 16;
constexpr int TOGETHER = 32;  // blocks: 16 KiB at 4 bits

// What the bits of a window, counted from its first one, are used for.
struct Layout {
  int index[4];   // of the lookup
  int choose[3];  // the others, as many as there are
  bool five;      // choose[0] lies above the index in the same byte
};

// Of a window that begins with bit `shift` of a byte. An index is five bits of one byte if there are such, else half a byte, else
// bits 7 to 10, of which the first comes last.
constexpr Layout layout_of(int window, int shift) {
  int first = -1;
  bool five = false;
  for (int wanted = 0; wanted < 4; ++wanted)
    for (int i = 0; i + 5 <= window && first < 0; ++i)
      if ((shift + i) % 8 == wanted) first = i, five = true;
  for (int i = 0; i + 4 <= window && first < 0; ++i)
    if ((shift + i) % 4 == 0) first = i;
  const bool across = first < 0;
  if (across) first = 7 - shift;
  Layout found{{first + across, first + 1 + across, first + 2 + across, across ? first : first + 3}, {}, five};
  int count = 0;
  if (five) found.choose[count++] = first + 4;
  for (int i = 0; i < window; ++i)
    if (i < first || i >= first + 4 + five) found.choose[count++] = i;
  return found;
}

// Whether pairs of lookups are one. At window 6, choosing costs no more where no five bits lie together.
constexpr bool paired(int window, int shift) { return window == 7 || layout_of(window, shift).five; }

// Sixteen entries, greater by `bias`, for each setting of the bits that choose; of pairs the second ones xor the first.
template <int WINDOW, int SHIFT>
void lay_out(const int8_t* entries, int32_t bias, uint8_t (*parts)[16]) {
  constexpr Layout layout = layout_of(WINDOW, SHIFT);
  for (int part = 0; part < 1 << (WINDOW - 4); ++part) {
    int chosen = 0;
    for (int i = 0; i < WINDOW - 4; ++i) chosen |= (part >> i & 1) << layout.choose[i];
#pragma GCC unroll 16
    for (int index = 0; index < 16; ++index) {
      int window = chosen;
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) window |= (index >> i & 1) << layout.index[i];
      parts[part][index] = static_cast<uint8_t>(entries[window] + bias);
    }
  }
  for (int part = 0; paired(WINDOW, SHIFT) && part < 1 << (WINDOW - 4); part += 2)
    for (int index = 0; index < 16; ++index) parts[part + 1][index] ^= parts[part][index];
}

// `b` where the highest bit of a byte is set. The compiler would compare that bit first, where it is asked for twice.
INLINE __m256i choose(__m256i a, __m256i b, __m256i bits) {
  __m256i found;
  asm("vpblendvb %3, %2, %1, %0" : "=x"(found) : "x"(a), "x"(b), "x"(bits));
  return found;
}

template <int WINDOW, int SHIFT>
struct Lookup {
  static constexpr Layout LAYOUT = layout_of(WINDOW, SHIFT);
  static constexpr int AT = SHIFT + LAYOUT.index[0];  // bit where the index begins: of the first byte, or from 8 on of the next
  __m256i parts[1 << (WINDOW - 4)];

  INLINE Lookup make(const uint8_t (*parts)[16]) {
    Lookup found;
#pragma GCC unroll 8
    for (int i = 0; i < 1 << (WINDOW - 4); ++i)
      found.parts[i] = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(parts[i])));
    return found;
  }

  // The I-th bit that chooses as the highest bit of every byte.
  template <int I>
  INLINE __m256i raise(__m256i byte, __m256i next) {
    constexpr int BIT = SHIFT + LAYOUT.choose[I];
    const __m256i bytes = BIT < 8 ? byte : next;
    if constexpr (BIT % 8 == 7) return bytes;
    if constexpr (BIT % 8 == 6) return _mm256_add_epi8(bytes, bytes);
    return _mm256_slli_epi16(bytes, 7 - BIT % 8);
  }

  INLINE __m256i index(__m256i byte, __m256i next) {
    if constexpr (!LAYOUT.five && SHIFT + LAYOUT.index[3] == 7 && AT == 8) {  // across two bytes
      const __m256i highest = _mm256_and_si256(_mm256_srli_epi16(byte, 4), _mm256_set1_epi8(8));
      return _mm256_or_si256(_mm256_and_si256(next, _mm256_set1_epi8(7)), highest);
    }
    const __m256i mask = _mm256_set1_epi8(LAYOUT.five ? 31 : 15);
    if constexpr (AT % 8 == 0) return _mm256_and_si256(AT == 0 ? byte : next, mask);
    return _mm256_and_si256(_mm256_srli_epi16(byte, AT), mask);
  }

  // What a lookup of windows from bit SHIFT of `byte` on, which may go on in `next`, goes by.
  struct Bits {
    __m256i first, second, chosen[3];
  };

  INLINE Bits bits_of(__m256i byte, __m256i next) {
    Bits bits;
    bits.first = index(byte, next);
    if constexpr (!LAYOUT.five) bits.chosen[0] = raise<0>(byte, next);
    bits.chosen[1] = raise<1>(byte, next);
    if constexpr (WINDOW == 7) bits.chosen[2] = raise<2>(byte, next);
    if constexpr (LAYOUT.five) bits.second = _mm256_sub_epi8(bits.first, _mm256_set1_epi8(16));
    if constexpr (!LAYOUT.five && paired(WINDOW, SHIFT))
      bits.second = _mm256_or_si256(bits.first, _mm256_andnot_si256(bits.chosen[0], _mm256_set1_epi8(-128)));
    return bits;
  }

  INLINE __m256i find(const Lookup& self, const Bits& bits) {
    constexpr int COUNT = 1 << (WINDOW - 4);
    __m256i v[COUNT];
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; i += 2) {
      const __m256i low = _mm256_shuffle_epi8(self.parts[i], bits.first);
      if constexpr (paired(WINDOW, SHIFT)) {
        v[i] = _mm256_xor_si256(low, _mm256_shuffle_epi8(self.parts[i + 1], bits.second));
      } else {
        v[i] = choose(low, _mm256_shuffle_epi8(self.parts[i + 1], bits.first), bits.chosen[0]);
      }
    }
#pragma GCC unroll 2
    for (int i = 0; i < COUNT; i += 4) v[i] = choose(v[i], v[i + 2], bits.chosen[1]);
    if constexpr (WINDOW == 7) v[0] = choose(v[0], v[4], bits.chosen[2]);
    return v[0];
  }
};

// Where the windows of a step lie.
struct Place {
  int32_t byte, next;  // offsets of the registers that they begin in, and go on in
  int shift;
};

// A table, and what its entries are greater by.
struct Entries {
  const int8_t* table;
  int32_t bias, greatest;
  uint32_t laid;  // for which shifts there are parts
  Place places[MOST_STEPS];
  alignas(16) uint8_t parts[8][8][16];
};

struct Tile {
  int steps, bytes;  // bytes of a lane's stream
  const uint8_t* codes;
  Entries entries[2];
};

INLINE void begin_entries(const Weight& weight, const Tile& t, const int8_t* table, int lag, Entries& e) {
  e.table = table;
  e.laid = 0;
  int32_t lowest = table[0], highest = table[0];
  for (int i = 1; i < 1 << weight.window; ++i) {
    lowest = least(table[i], lowest);
    highest = table[i] > highest ? table[i] : highest;
  }
  e.bias = -lowest;
  e.greatest = highest - lowest;
  const int bits = 8 * t.bytes;
  for (int step = 0; step < t.steps; ++step) {
    const int start = (weight.bits * (step - lag + 1) - weight.window + 64 * bits) % bits, byte = start / 8;
    e.places[step] = {64 * byte, byte + 1 == t.bytes ? 0 : 64 * (byte + 1), start % 8};
  }
}

// The first block of a tile that is worked on is `block`.
INLINE void begin_tile(const Weight& weight, int32_t tile, int32_t block, Tile& t) {
  const int32_t height = least(weight.rows - tile * TILE_ROWS, TILE_ROWS);
  t.steps = (height + 15) / 16;
  t.bytes = (weight.bits * t.steps + 7) / 8;
  const int64_t blocks = (weight.columns + 3) / 4, whole = 2 * weight.bits;
  t.codes = static_cast<const uint8_t*>(weight.codes) + 64 * (whole * tile * blocks + static_cast<int64_t>(block) * t.bytes);
  // With one table a lag only moves values to later steps.
  begin_entries(weight, t, weight.table, weight.tables == 2 ? 0 : weight.lag, t.entries[0]);
  if (weight.tables == 2) begin_entries(weight, t, weight.table + (1 << weight.window), weight.lag, t.entries[1]);
}

// What is done with the entries of a step.
struct Dot {
  const int32_t* inputs;
  __m256i total[2];
  INLINE void take(Dot& self, int32_t i, int half, __m256i value) {
    self.total[half] = _mm256_add_epi32(self.total[half], unsigned_products(value, _mm256_set1_epi32(self.inputs[i])));
  }
};

template <bool MORE>  // a second table's
struct Store {
  int8_t* panel;
  INLINE void take(Store& self, int32_t i, int half, __m256i value) {
    __m256i* to = reinterpret_cast<__m256i*>(self.panel + 64 * static_cast<int64_t>(i) + 32 * half);
    _mm256_storeu_si256(to, MORE ? _mm256_add_epi8(value, _mm256_loadu_si256(to)) : value);
  }
};

// A step of some blocks.
template <int WINDOW, int SHIFT, typename Sink>
__attribute__((noinline)) void run_step(Entries& entries, const Place& place, const uint8_t* const* blocks, int32_t count, Sink& sink) {
  using Find = Lookup<WINDOW, SHIFT>;
  uint8_t (*parts)[16] = entries.parts[SHIFT];
  if ((entries.laid >> SHIFT & 1) == 0) lay_out<WINDOW, SHIFT>(entries.table, entries.bias, parts);
  entries.laid |= 1u << SHIFT;
  const Find lookup = Find::make(parts);
  Sink mine = sink;
  const int64_t byte = place.byte, next = place.next;
  const auto bits_at = [&](int32_t i, int half) __attribute__((always_inline)) {
    const uint8_t* at = blocks[i] + 32 * half;
    return Find::bits_of(load(at + byte), load(at + next));
  };
  for (int32_t i = 0; i < count; ++i)
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) Sink::take(mine, i, half, Find::find(lookup, bits_at(i, half)));
  sink = mine;
}

template <int WINDOW, typename Sink>
INLINE void run_shift(Entries& entries, const Place& place, const uint8_t* const* blocks, int32_t count, Sink& sink) {
  switch (place.shift) {
    case 0: return run_step<WINDOW, 0>(entries, place, blocks, count, sink);
    case 1: return run_step<WINDOW, 1>(entries, place, blocks, count, sink);
    case 2: return run_step<WINDOW, 2>(entries, place, blocks, count, sink);
    case 3: return run_step<WINDOW, 3>(entries, place, blocks, count, sink);
    case 4: return run_step<WINDOW, 4>(entries, place, blocks, count, sink);
    case 5: return run_step<WINDOW, 5>(entries, place, blocks, count, sink);
    case 6: return run_step<WINDOW, 6>(entries, place, blocks, count, sink);
    default: return run_step<WINDOW, 7>(entries, place, blocks, count, sink);
  }
}

template <typename Sink>
INLINE void run(int window, Entries& entries, int step, const uint8_t* const* blocks, int32_t count, Sink& sink) {
  const Place& place = entries.places[step];
  return window == 6 ? run_shift<6>(entries, place, blocks, count, sink) : run_shift<7>(entries, place, blocks, count, sink);
}

// The lines that a step's share of the next blocks lies in; `shares`: how many of them belong to the steps before.
INLINE void fetch_share(const uint8_t* blocks, const int32_t* shares, int step) {
  for (int32_t line = shares[step]; line < shares[step + 1]; ++line)
    _mm_prefetch(reinterpret_cast<const char*>(blocks + 64 * static_cast<int64_t>(line)), _MM_HINT_T0);
}

// Some blocks and their inputs; a block whose inputs were cut in two stands there twice.
struct Blocks {
  const uint8_t* at[2 * TOGETHER];
  int32_t inputs[2 * TOGETHER];
  int32_t count;
};

// `most`: see most_together. Returns the inputs' sum.
INLINE int32_t list_blocks(const uint8_t* codes, int64_t bytes, const int8_t* x, int32_t count, int32_t most, Blocks& blocks) {
  __m256i total = _mm256_setzero_si256();
  uint64_t large = 0;
  for (int32_t i = 0; i < count; i += 8) {
    const __m256i inputs = load_some(x + 4 * i, 4 * (count - i));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(blocks.inputs + i), inputs);
    large |= static_cast<uint64_t>(too_large(inputs, most)) << i;
    total = _mm256_add_epi32(total, unsigned_products(_mm256_set1_epi8(1), inputs));
  }
  for (int32_t i = 0; i < count; ++i) blocks.at[i] = codes + bytes * i;
  blocks.count = count;
  for (; large != 0; large &= large - 1, ++blocks.count) {
    const int32_t which = __builtin_ctzll(large), whole = blocks.inputs[which];
    blocks.at[blocks.count] = blocks.at[which];
    blocks.inputs[which] = half_of(whole);
    blocks.inputs[blocks.count] = rest_of(whole, blocks.inputs[which]);
  }
  return sum(total);
}

void multiply_tile(const Weight& weight, int32_t tile, int32_t first, int32_t last, const int8_t* x, int32_t* sums) {
  Tile t;
  begin_tile(weight, tile, first, t);
  const int64_t bytes = 64 * static_cast<int64_t>(t.bytes);
  int32_t greatest = t.entries[0].greatest, bias = t.entries[0].bias, inputs = 0;
  if (weight.tables == 2) {
    greatest = t.entries[1].greatest > greatest ? t.entries[1].greatest : greatest;
    bias += t.entries[1].bias;
  }
  int32_t shares[MOST_STEPS + 1];
  for (int step = 0; step <= t.steps; ++step) shares[step] = TOGETHER * t.bytes * step / t.steps;
  __m256i total[MOST_STEPS][2];
  for (auto& step : total) step[0] = step[1] = _mm256_setzero_si256();
  for (int32_t b = 0; b < last - first; b += TOGETHER) {
    const uint8_t* codes = t.codes + b * bytes;
    Blocks blocks;
    inputs += list_blocks(codes, bytes, x + 4 * (static_cast<int64_t>(first) + b), least(last - first - b, TOGETHER),
                          most_together(greatest), blocks);
    for (int step = 0; step < t.steps; ++step) {
      fetch_share(codes + TOGETHER * bytes, shares, step);
      Dot dot{blocks.inputs, {total[step][0], total[step][1]}};
      run(weight.window, t.entries[0], step, blocks.at, blocks.count, dot);
      if (weight.tables == 2) run(weight.window, t.entries[1], step, blocks.at, blocks.count, dot);
      for (int half = 0; half < 2; ++half) total[step][half] = dot.total[half];
    }
  }
  const __m256i shift = _mm256_mullo_epi32(_mm256_set1_epi32(bias), _mm256_set1_epi32(inputs));
  for (int step = 0; step < t.steps; ++step)
    for (int half = 0; half < 2; ++half)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + 16 * step + 8 * half), _mm256_sub_epi32(total[step][half], shift));
}

void decode_panel(const Weight& weight, const Part& part, uint8_t flip, int8_t* panel) {
  Tile t;
  begin_tile(weight, part.first_row / TILE_ROWS, part.first_column / 4, t);
  t.entries[0].bias = flip;  // added to the sum of both, modulo 256, it turns the highest bit
  t.entries[1].bias = 0;
  const int64_t bytes = 64 * static_cast<int64_t>(t.bytes);
  const int32_t all = (part.columns + 3) / 4;
  for (int32_t b = 0; b < all; b += TOGETHER) {
    const uint8_t* blocks[TOGETHER];
    const int32_t count = least(all - b, TOGETHER);
    for (int32_t i = 0; i < count; ++i) blocks[i] = t.codes + bytes * (b + i);
    for (int step = 0; step < t.steps; ++step) {
      int8_t* to = panel + (static_cast<int64_t>(step) * part.blocks + b) * LANES;
      Store<false> store{to};
      run(weight.window, t.entries[0], step, blocks, count, store);
      Store<true> more{to};
      if (weight.tables == 2) run(weight.window, t.entries[1], step, blocks, count, more);
    }
  }
}

}  // namespace

const KindKernels trellis_avx2 = {nullptr, multiply_tile, decode_panel};

}  // namespace quern
