// What a kind of weights consists of. A kind is csrc/kinds/<kind>.cc, a file csrc/kinds/<kind>_<instruction set>.cc for each
// instruction set that has something better for it, and a line in csrc/kinds/kinds.{h,cc}; nothing else knows it.
#pragma once

#include <cstdint>
#include <string>

#include "kernels/kernels.h"

namespace quern {

// The functions of one instruction set for one kind; null: what the next lower one has.
struct KindKernels {
  // outputs[token * inputs.rows + row] for rows [first, last); `first` is a multiple of 8. Kinds whose rows lie one after the
  // other.
  void (*rows)(const Weight& weight, const Inputs& inputs, int32_t first, int32_t last, float* outputs);
  // sums[row of the tile] of one token over blocks [first, last) of 4 columns; `x` is the token's first value. Kinds whose codes
  // lie in tiles.
  void (*tile)(const Weight& weight, int32_t tile, int32_t first, int32_t last, const int8_t* x, int32_t* sums);
  // Decode into a panel; each byte is the code's value xor `flip`, which is 0 or 128. Packed kinds.
  void (*panel)(const Weight& weight, const Part& part, uint8_t flip, int8_t* panel);
  // Scales, and minimums where the kind has them, of up to TILE_ROWS rows from `first` on: (groups, TILE_ROWS) each, as
  // many rows as fill up 16. Kinds whose scales lie among their codes.
  void (*numbers)(const Weight& weight, int32_t first, int32_t rows, float* scales, float* minimums) = nullptr;
};

constexpr int32_t ISA_LEVELS = 4;  // scalar, avx2, avx512, amx: each implies those before it

struct WeightKind {
  const char* name;
  bool plain;          // floating-point numbers, which meet inputs as they are; all others are integers and meet int8 inputs
  bool scaled;         // whether it has scales beside its codes
  bool zero_points;    // whether it may have them
  int32_t alignment;   // of its codes in memory, bytes
  int64_t (*row_bytes)(int64_t columns);         // of codes; null: they lie in tiles
  int64_t (*tile_bytes)(const Weight& weight);   // of all codes; null: they lie in rows
  int64_t (*table_bytes)(const Weight& weight);  // null: has no table
  void (*check)(const Weight& weight);           // std::invalid_argument for numbers that there is no such code of; or null
  void (*decode)(const Weight& weight, int32_t row, float* out);  // row `row`, float32 (columns,)
  const KindKernels* kernels[ISA_LEVELS];        // by level; null: nothing better than the next lower one
  bool minimums = false;  // whether groups have minimums, which lie among the codes

  bool tiled() const { return row_bytes == nullptr; }
};

// The kind called `name`. Throws std::invalid_argument, naming those that there are.
const WeightKind& kind_called(const std::string& name);

// What there is for the weight's kind at an instruction set's level (`Kernels::level`) and below.
KindKernels kernels_of(const Weight& weight, int32_t level);

// The most tokens that row kernels of an instruction set's level multiply faster than panels: of a weight, and of any.
int32_t row_tokens(const Weight& weight, int32_t level);
int32_t most_row_tokens(int32_t level);

}  // namespace quern
