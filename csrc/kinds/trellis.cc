// Trellis codes; the layout is in kernels/weight.h.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "kernels/scalar.h"
#include "kinds/kinds.h"

namespace quern {
namespace {

// One column of one tile's 16 rows r, r + 16, ...: where its code stream lies and how long it is.
struct Stream {
  const uint8_t* bytes;  // byte j at bytes[64 * j]
  int32_t steps, bits;   // bits: of the whole bytes

  Stream(const Weight& weight, int32_t tile, int32_t block, int32_t lane) {
    const int32_t height = std::min(weight.rows - tile * TILE_ROWS, TILE_ROWS);
    steps = (height + 15) / 16;
    const int32_t registers = (weight.bits * steps + 7) / 8, whole = (weight.bits * 16 + 7) / 8;
    const int64_t blocks = (weight.columns + 3) / 4;
    bits = 8 * registers;
    bytes = static_cast<const uint8_t*>(weight.codes) +
            LANES * (tile * blocks * whole + static_cast<int64_t>(block) * registers) + lane;
  }

  // The `window` bits that end with step `step`'s; steps below 0 go round the end. At most 7 + 7 bits: two bytes hold them.
  int32_t index(const Weight& weight, int32_t step) const {
    const int32_t first = ((weight.bits * (step + 1) - weight.window) % bits + bits) % bits;
    const int32_t byte = first / 8, next = 8 * byte + 8 == bits ? 0 : byte + 1;
    return (bytes[LANES * byte] | bytes[LANES * next] << 8) >> first % 8 & ((1 << weight.window) - 1);
  }

  int32_t value(const Weight& weight, int32_t step) const {
    if (weight.tables == 1) return weight.table[index(weight, step - weight.lag)];
    return weight.table[index(weight, step)] + weight.table[(1 << weight.window) + index(weight, step - weight.lag)];
  }
};

void multiply_tile(const Weight& weight, int32_t tile, int32_t first, int32_t last, const int8_t* x, int32_t* sums) {
  const int32_t steps = Stream(weight, tile, 0, 0).steps;
  memset(sums, 0, sizeof(int32_t) * 16 * steps);
  for (int32_t block = first; block < last; ++block) {
    for (int32_t lane = 0; lane < LANES; ++lane) {
      const Stream stream(weight, tile, block, lane);
      for (int32_t step = 0; step < steps; ++step)
        sums[16 * step + lane / 4] += stream.value(weight, step) * x[4 * block + lane % 4];
    }
  }
}

void decode_panel(const Weight& weight, const Part& part, uint8_t flip, int8_t* panel) {
  const int32_t tile = part.first_row / TILE_ROWS, first = part.first_column / 4;
  for (int32_t block = 0; block < (part.columns + 3) / 4; ++block)
    for (int32_t lane = 0; lane < LANES; ++lane) {
      const Stream stream(weight, tile, first + block, lane);
      for (int32_t step = 0; step < stream.steps; ++step)
        panel[(step * static_cast<int64_t>(part.blocks) + block) * LANES + lane] =
            static_cast<int8_t>(stream.value(weight, step) ^ flip);
    }
}

void decode_row(const Weight& weight, int32_t row, float* out) {
  const int32_t in_tile = row % TILE_ROWS;
  float scale;
  scalar::scales(weight, row, 0, 1, &scale);
  for (int32_t c = 0; c < weight.columns; ++c) {
    const Stream stream(weight, row / TILE_ROWS, c / 4, in_tile % 16 * 4 + c % 4);
    out[c] = static_cast<float>(stream.value(weight, in_tile / 16)) * scale;
  }
}

int64_t tile_bytes(const Weight& weight) {
  const int64_t blocks = (weight.columns + 3) / 4, tiles = weight.rows / TILE_ROWS;
  const int64_t rest = (weight.rows % TILE_ROWS + 15) / 16;
  return LANES * blocks * (tiles * weight.bits * 2 + (weight.bits * rest + 7) / 8);
}

int64_t table_bytes(const Weight& weight) { return static_cast<int64_t>(weight.tables) << weight.window; }

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

void check(const Weight& weight) {
  require(weight.bits >= 1 && weight.bits <= 4, "a trellis has 1 to 4 bits a weight");
  require(weight.window == 6 || weight.window == 7, "a trellis has a window of 6 or 7 bits");
  require(weight.tables == 1 || weight.tables == 2, "a trellis has one or two tables");
  require(weight.tables == 1 ? weight.lag == 0 : weight.lag >= 1 && weight.lag <= 8, "the second table lags by 1 to 8 steps");
  require(weight.group == weight.columns, "a trellis has one scale a row");
}

const KindKernels trellis_scalar = {nullptr, multiply_tile, decode_panel};

}  // namespace

const WeightKind trellis = {
    "trellis", false, true, false, 1, nullptr, tile_bytes, table_bytes, check, decode_row,
    {&trellis_scalar, FIRST_KERNELS(trellis_avx2, trellis_neon), AVX512_KERNELS(trellis_avx512), nullptr},
};

}  // namespace quern
