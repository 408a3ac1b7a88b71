// The table of functions that every instruction set fills in, as far as it has something better than the next lower one. What
// depends on how weights are packed is in kernels/kind.h.
//
// One rule fixes every result, whatever the instruction set, the number of threads and the number of tokens that are
// computed together. For packed kinds, with integers summed exactly:
//     out = 0;  for each group of columns, first to last:  out = fma(float(sum of code values * inputs), ws * xs, out)
// where ws and xs are the scales of weight and input, as float32. Kinds with minimums add another sum in the end,
//     low = 0;  for each group:  low = fma(minimum, float(sum of inputs) * xs, low)
// For plain kinds there are 16 partial sums, lane l has
// the columns l, l + 16, ... in order, each step one fma; they are added as lane i + lane (i + 8), then 4, 2, 1 apart. Plain
// kinds with scales do that for each group of columns by itself, and  out = fma(sum, ws, out)  over them.
#pragma once

#include <cstdint>

#include "kernels/weight.h"

namespace quern {

constexpr int32_t MANY_TOKENS = 8;   // the most that the row kernels take at once
constexpr int32_t TILE_ROWS = 256;   // rows of a trellis tile, and of a panel
constexpr int32_t LANES = 64;        // bytes of a register: 16 rows x 4 columns

// What the row kernels read of at most MANY_TOKENS tokens' activations.
struct Inputs {
  int32_t tokens, columns, group, groups;
  const int8_t* values;   // (tokens, stride), zero from `columns` on
  int64_t stride;         // a multiple of 64
  const int8_t* halves;   // (tokens, 2, half): the values of even columns, then those of odd ones; zero-filled
  int64_t half;           // a multiple of 128
  const int8_t* quarters; // (tokens, 4, quarter): the values of columns 0, 4, 8 ..., then those of 1, 5, 9 ... and so on
  int64_t quarter;        // a multiple of 64
  const float* scale;     // (tokens, groups)
  const int32_t* sums;    // (tokens, groups)
  const float* exact;     // (tokens, columns)
  int64_t rows;           // floats from one token's outputs to the next one's
};

// Rows and columns that are decoded into a panel: int8 (ceil(rows / 16), blocks, 64), byte row % 16 * 4 + column % 4 of
// register [row / 16][column / 4]. Rows past the end are filled with anything; columns past the end meet zero inputs.
struct Part {
  int32_t first_row, rows;         // at most TILE_ROWS; for a trellis one tile
  int32_t first_column, columns;   // first_column is a multiple of 4
  int32_t blocks;                  // registers from one 16 rows to the next, at least ceil(columns / 4)
};

struct Kernels {
  const char* name;

  // int8 values of one token, a scale and a sum for each group. A group with a NaN or an infinity gets the scale NaN; one
  // whose greatest |x| is below 2^-100 the scale 0, unless the scale is `given` (above 0); both zero values. Beyond a given
  // scale values end at -127 and 127.
  void (*quantize)(const float* x, int32_t columns, int32_t group, float given, int8_t* values, float* scale,
                   int32_t* sums);
  // `count` values, a multiple of 128, into even and odd ones.
  void (*split)(const int8_t* values, int64_t count, int8_t* even, int8_t* odd);
  void (*rotate)(float* values, int32_t columns, int32_t block, const uint8_t* signs);
  // `count` scales of a row from group `first` on, as float32.
  void (*scales)(const Weight& weight, int32_t row, int32_t first, int32_t count, float* out);

  // What the two next ones want as the `flip` of decoding (KindKernels::panel); their sums are too great by flip * sum of the inputs.
  uint8_t flip;
  // sums (row_groups, tokens, 16) += panel (row_groups, blocks, 64) * inputs of 4 * blocks columns.
  void (*panel)(const int8_t* panel, int32_t row_groups, int32_t blocks, const int8_t* x, int64_t stride, int32_t tokens,
                int32_t* sums);
  // out (row_groups, tokens, 16) = fma(float(sums - flip * xsum[token]), ws[row] * xs[token], out)
  void (*flush)(const int32_t* sums, int32_t row_groups, int32_t tokens, const float* ws, const float* xs,
                const int32_t* xsum, int64_t token_stride, int32_t flip, float* out);
  // `panel` and `flush` at once for `groups` groups of `group` columns, a multiple of 16: ws (groups, TILE_ROWS), xs and
  // xsum (tokens, token_stride). Null where there is nothing better than one after the other.
  void (*grouped)(const int8_t* panel, int32_t row_groups, int32_t blocks, int32_t group, int32_t groups, const int8_t* x,
                  int64_t stride, int32_t tokens, const float* ws, const float* xs, const int32_t* xsum,
                  int64_t token_stride, float* out);

  // out (row_groups, tokens, 16) += low, the sums over all groups of fma(minimums, float(xsum) * xs, low): minimums
  // (groups, TILE_ROWS), xs and xsum (tokens, groups).
  void (*minimums)(const float* minimums, int32_t row_groups, int32_t tokens, int32_t groups, const float* xs,
                   const int32_t* xsum, float* out);

  // Read memory as fast as it goes; returns something that depends on all of it.
  uint64_t (*read)(const void* data, int64_t bytes);

  // How many instruction sets are below: scalar 0, AVX2 1, AVX-512 2, AMX 3.
  int32_t level = 0;
};

// Of the instruction set in use (kernels/dispatch.h).
const Kernels& kernels();

}  // namespace quern
