// Weight matrices as the kernels see them: views on the tensors of an artifact, in the very bytes that lie on the disk, so
// that a memory-mapped artifact needs no load time and is shared between processes.
#pragma once

#include <cstdint>

namespace quern {

struct WeightKind;  // kernels/kind.h

enum class Float : int32_t { float16 = 1, bfloat16 = 2, float32 = 3, float8_e4m3 = 4, float8_e8m0 = 5 };

static inline int64_t bytes_of(Float type) { return type == Float::float32 ? 4 : type >= Float::float8_e4m3 ? 1 : 2; }

// outputs[token][row] = sum over columns of value(row, column) * inputs[token][column], where by kind (csrc/kinds) value is
//   integer4   (code - zero) * scale[row][group], of 4-bit codes, two a byte along the row, low nibble first
//   integer8   code * scale[row][group], of int8 codes
//   codebook2, codebook3, codebook4
//              table[code] * scale[row][group], of codes of so many bits. Two and four bits lie as above, four or two a byte. Of
//              three bits the lower two lie so; after them, in the same row, the third ones of every 256 columns as four planes,
//              those of columns 0, 4, 8 ... first, a bit each; planes of the last, fewer columns are as many whole bytes as they
//              need
//   float8_e4m3, float8_e5m2  number * scale[row][group], of 8-bit floating-point numbers (OCP 8-bit Floating Point, 2023)
//   trellis    sum of table entries * scale[row]; see below
//   q2_k, q3_k, q4_k, q5_k, q6_k, iq4_xs
//              code * scale[row][group] + minimum[row][group], of super-blocks as a GGUF file holds them (kinds/superblock-inl.h):
//              float32 products of the block's float16 numbers and the group's whole ones; groups are of 16 or 32 columns
//   q4_1, q5_1 the same of blocks of 32 columns, whose scale and minimum are float16 numbers
//   iq2_xxs, iq2_xs, iq2_s, iq3_xxs, iq3_s
//              size * sign * scale[row][group], of super-blocks: points of 8 or 4 columns, whose sizes are in `table`, and signs
//   bfloat16, float32  plain numbers
//
// Trellis layout. Rows are cut into tiles of 256 (the last one may have fewer), columns into blocks of 4 (the last one is
// filled up with zero inputs). A tile of `height` rows has `steps` = ceil(height / 16) steps; a block of it is
// ceil(bits * steps / 8) registers of 64 bytes. Byte `lane` = (row % 16) * 4 + column % 4 of register j is byte j of that
// lane's code stream, which runs down the rows row % 16 + 16 * step of one column. Step t owns the bits
// [bits * t, bits * (t + 1)) of the stream, bit i being bit i % 8 of byte i / 8. The window of step t is the `window` bits
// that end with them, the newest highest, read around the end of the whole bytes. With one table the value is
// table[window(t)]; with two it is table[0][window(t)] + table[1][window(t - lag)].
// Order in memory: tiles, in them blocks of columns, in them registers.
struct Weight {
  const WeightKind* kind;
  int32_t rows, columns;
  int32_t group;           // columns that share a scale; == columns where a row has only one
  Float scale_type;
  const void* codes;
  int64_t row_bytes;       // bytes of a row of codes; kinds whose codes lie in rows
  const void* scale;       // (rows, ceil(columns / group)); each means so many times itself:
  float scale_factor;
  int64_t scale_stride;    // scales from one row to the next: 0 where all rows share one (granularity tensor)
  const int32_t* zeros;    // integer4: zero points, packed down the rows like codes along them, (ceil(rows / 8), groups);
                           // null: 8 for every group
  const int8_t* table;     // codebooks: 2^bits entries; trellis: tables x 2^window; of points: their sizes
  int64_t table_row;       // codebooks: entries from one row's table to the next one's, and from one group's; 0: they share one
  int64_t table_group;
  int32_t bits;            // trellis: bits of a weight, 2, 3 or 4
  int32_t window;          // trellis: bits of an index, 6 or 7
  int32_t tables;          // trellis: 1 or 2
  int32_t lag;             // trellis: steps by which the second table's window is older
};

// Bytes that `codes` must have.
int64_t code_bytes(const Weight& weight);

}  // namespace quern
