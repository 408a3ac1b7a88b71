// Trellis codes; see trellis_avx512.cc. A register is half as wide: rows 0 to 7 or 8 to 15 of each step.
//
// vpshufb looks up 16 entries and gives zero where the highest bit of the index is set. So with k the index, k - 16 i has that
// bit set where k < 16 i, and its lowest four bits are k's: xor over i of (table i - 1 ^ table i)[k - 16 i] leaves the right
// entry, for three operations each 16 entries. Shifts by a number that is known at run time only are multiplications.
//
// Some blocks are taken together, step by step: what a step needs then stays in registers, and the blocks in the L1 cache.
#include "kernels/common_avx2.h"
#include "kinds/kinds.h"

namespace quern {
namespace {

constexpr int MOST_STEPS = 16;
constexpr int TOGETHER = 16;  // blocks: 8 KiB at 4 bits

// 16 entries in each half of a register, from the second part on xor those before.
struct Table {
  __m256i parts[8];
};

INLINE Table load_table(const int8_t* entries, int window) {
  Table table;
  __m128i before = _mm_setzero_si128();
  for (int i = 0; i < 1 << (window - 4); ++i) {
    const __m128i part = _mm_loadu_si128(reinterpret_cast<const __m128i*>(entries + 16 * i));
    table.parts[i] = _mm256_broadcastsi128_si256(_mm_xor_si128(part, before));
    before = part;
  }
  return table;
}

template <int WINDOW>
INLINE __m256i look_up(const Table& table, __m256i index) {
  const __m256i sixteen = _mm256_set1_epi8(16);
  __m256i value = _mm256_shuffle_epi8(table.parts[0], index);
#pragma GCC unroll 8
  for (int i = 1; i < 1 << (WINDOW - 4); ++i) {
    index = _mm256_sub_epi8(index, sixteen);
    value = _mm256_xor_si256(value, _mm256_shuffle_epi8(table.parts[i], index));
  }
  return value;
}

// Where the window of a step lies: at the low end of a byte of the stream, inside of one, or across two.
enum Place { LOW, INSIDE, ACROSS };

struct Window {
  Place place;
  int64_t byte, next;    // offsets of registers
  __m256i right, left;   // factors that shift by `shift` to the right, and by 8 - `shift` to the left
  __m256i mine, others;  // bits of the window that come from either byte
};

INLINE Window window_of(const Weight& weight, int bytes, int step) {
  const int bits = 8 * bytes, start = (weight.bits * (step + 1) - weight.window + 64 * bits) % bits, shift = start % 8;
  const int all = (1 << weight.window) - 1, mine = (0xff >> shift) & all;
  Window w;
  w.place = shift == 0 ? LOW : shift + weight.window <= 8 ? INSIDE : ACROSS;
  w.byte = 64 * (start / 8);
  w.next = start / 8 + 1 == bytes ? 0 : w.byte + 64;
  w.right = _mm256_set1_epi16(static_cast<int16_t>(1 << (16 - (shift == 0 ? 1 : shift))));
  w.left = _mm256_set1_epi16(static_cast<int16_t>(1 << (8 - shift)));
  w.mine = _mm256_set1_epi8(static_cast<char>(mine));
  w.others = _mm256_set1_epi8(static_cast<char>(all & ~mine));
  return w;
}

template <Place PLACE>
INLINE __m256i index_at(const Window& w, const uint8_t* block) {
  const __m256i byte = load(block + w.byte);
  if constexpr (PLACE == LOW) return _mm256_and_si256(byte, w.mine);
  const __m256i right = _mm256_and_si256(_mm256_mulhi_epu16(byte, w.right), w.mine);
  if constexpr (PLACE == INSIDE) return right;
  return _mm256_or_si256(right, _mm256_and_si256(_mm256_mullo_epi16(load(block + w.next), w.left), w.others));
}

// A tile, and what its steps need.
struct Tile {
  Table tables[2];
  int steps, bytes;  // bytes of a lane's stream
  const uint8_t* codes;
};

INLINE Tile tile_of(const Weight& weight, int32_t tile, int32_t block) {
  Tile t;
  const int32_t height = least(weight.rows - tile * TILE_ROWS, TILE_ROWS);
  t.steps = (height + 15) / 16;
  t.bytes = (weight.bits * t.steps + 7) / 8;
  t.tables[0] = load_table(weight.table, weight.window);
  if (weight.tables == 2) t.tables[1] = load_table(weight.table + (1 << weight.window), weight.window);
  const int64_t blocks = (weight.columns + 3) / 4, whole = 2 * weight.bits;
  t.codes = static_cast<const uint8_t*>(weight.codes) + 64 * (whole * tile * blocks + static_cast<int64_t>(block) * t.bytes);
  return t;
}

// One step of some blocks from `codes` on.
struct Run {
  const uint8_t* codes;
  int32_t blocks;
  int64_t block_bytes;
  const Tile& tile;
  Window first, second;  // of the two tables
};

// What is done with the values of a step.
struct Dot {
  const int8_t* x;
  __m256i total[2];
  INLINE void take(Dot& self, int32_t block, int half, __m256i value) {
    int32_t four;
    __builtin_memcpy(&four, self.x + 4 * block, 4);
    self.total[half] = _mm256_add_epi32(self.total[half], products(value, _mm256_set1_epi32(four)));
  }
};

struct Store {
  int8_t* panel;
  __m256i flips;
  INLINE void take(Store& self, int32_t block, int half, __m256i value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(self.panel + 64 * static_cast<int64_t>(block) + 32 * half),
                        _mm256_xor_si256(value, self.flips));
  }
};

template <int WINDOW, bool TWO, Place FIRST, Place SECOND, typename Sink>
void run_step(const Run& run, Sink& sink) {
  Sink mine = sink;
  const uint8_t* block = run.codes;
  for (int32_t b = 0; b < run.blocks; ++b, block += run.block_bytes)
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m256i value = look_up<WINDOW>(run.tile.tables[0], index_at<FIRST>(run.first, block + 32 * half));
      if constexpr (TWO)
        value = _mm256_add_epi8(value, look_up<WINDOW>(run.tile.tables[1], index_at<SECOND>(run.second, block + 32 * half)));
      Sink::take(mine, b, half, value);
    }
  sink = mine;
}

template <int WINDOW, Place FIRST, typename Sink>
INLINE void run_second(const Run& run, bool two, Sink& sink) {
  if (!two) return run_step<WINDOW, false, FIRST, LOW>(run, sink);
  switch (run.second.place) {
    case LOW: return run_step<WINDOW, true, FIRST, LOW>(run, sink);
    case INSIDE: return run_step<WINDOW, true, FIRST, INSIDE>(run, sink);
    default: return run_step<WINDOW, true, FIRST, ACROSS>(run, sink);
  }
}

template <int WINDOW, typename Sink>
INLINE void run_first(const Run& run, bool two, Sink& sink) {
  switch (run.first.place) {
    case LOW: return run_second<WINDOW, LOW>(run, two, sink);
    case INSIDE: return run_second<WINDOW, INSIDE>(run, two, sink);
    default: return run_second<WINDOW, ACROSS>(run, two, sink);
  }
}

// Step `step` of blocks [first, first + count) from the tile's first one on.
template <typename Sink>
INLINE void run(const Weight& weight, const Tile& tile, int step, int32_t first, int32_t count, Sink& sink) {
  const int64_t size = 64 * static_cast<int64_t>(tile.bytes);
  const bool two = weight.tables == 2;
  // With one table a lag only moves values to later steps.
  const Run one{tile.codes + first * size, count, size, tile, window_of(weight, tile.bytes, two ? step : step - weight.lag),
                window_of(weight, tile.bytes, step - weight.lag)};
  return weight.window == 6 ? run_first<6>(one, two, sink) : run_first<7>(one, two, sink);
}

// The lines that a step's share of the next blocks lies in.
INLINE void fetch_share(const uint8_t* blocks, int64_t bytes, int step, int steps) {
  for (int64_t at = bytes * step / steps / 64 * 64; at < bytes * (step + 1) / steps; at += 64)
    _mm_prefetch(reinterpret_cast<const char*>(blocks + at), _MM_HINT_T0);
}

void multiply_tile(const Weight& weight, int32_t tile, int32_t first, int32_t last, const int8_t* x, int32_t* sums) {
  const Tile t = tile_of(weight, tile, first);
  const int64_t together = 64 * static_cast<int64_t>(TOGETHER) * t.bytes;
  __m256i total[MOST_STEPS][2];
  for (auto& step : total) step[0] = step[1] = _mm256_setzero_si256();
  for (int32_t b = 0; b < last - first; b += TOGETHER)
    for (int step = 0; step < t.steps; ++step) {
      fetch_share(t.codes + b / TOGETHER * together + together, together, step, t.steps);
      Dot dot{x + 4 * (static_cast<int64_t>(first) + b), {total[step][0], total[step][1]}};
      run(weight, t, step, b, least(last - first - b, TOGETHER), dot);
      for (int half = 0; half < 2; ++half) total[step][half] = dot.total[half];
    }
  for (int step = 0; step < t.steps; ++step)
    for (int half = 0; half < 2; ++half)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + 16 * step + 8 * half), total[step][half]);
}

void decode_panel(const Weight& weight, const Part& part, uint8_t flip, int8_t* panel) {
  const Tile t = tile_of(weight, part.first_row / TILE_ROWS, part.first_column / 4);
  for (int32_t b = 0; b < (part.columns + 3) / 4; b += TOGETHER)
    for (int step = 0; step < t.steps; ++step) {
      Store store{panel + (static_cast<int64_t>(step) * part.blocks + b) * LANES, _mm256_set1_epi8(static_cast<char>(flip))};
      run(weight, t, step, b, least((part.columns + 3) / 4 - b, TOGETHER), store);
    }
}

}  // namespace

const KindKernels trellis_avx2 = {nullptr, multiply_tile, decode_panel};

}  // namespace quern
