// Rounding the columns of a block of a matrix one after the other onto grids: with what those before them got wrong, or with
// all others as they are. The formulas stand in quantization/rounding/gptq.py and sweeps.py, whose loops these follow.
#pragma once

#include <cstdint>
#include <string>

namespace quern {

// Which numbers codes stand for at scale 1. Even steps: code c means c - zero, 0 <= c < count. Otherwise the number of rank i
// is `numbers[i]`, ascending, and what lies above `limits[i]` is nearer to a later one.
struct ColumnGrid {
  int32_t count;
  const float* limits;   // count - 1; null: even steps
  const float* numbers;  // by rank
  const uint8_t* codes;  // by rank
};

// The rows that are rounded, all arrays with one column of the weight a row: (columns, rows).
struct ColumnRows {
  int64_t rows;
  int64_t group;       // columns that share scales
  const float* scale;  // (groups, rows)
  const float* zero;   // of even steps, the same
  uint8_t* codes;      // of all columns
};

// Columns of a block: `size` of them, of which [first, last) are rounded now; `places` are their numbers in the matrix.
struct ColumnBlock {
  int64_t size, first, last;
  const int32_t* places;
};

struct ColumnKernels {
  // w'_k = target_k + sum_{j < k} inside_kj done_j is rounded to rounded_k; done_k = original_k - rounded_k, and target_k
  // becomes w'_k - rounded_k. `inside` is (size, size), the other matrices (size, rows).
  void (*feed_forward)(const ColumnGrid& grid, const ColumnRows& rows, const ColumnBlock& block, const float* inside,
                       const float* original, float* target, float* done, float* rounded);
  // rounded_k moves to what is nearest to rounded_k - residual_k / hessian_kk, and every residual_j by hessian_kj times the
  // move. `hessian` is symmetric (size, size).
  void (*sweep)(const ColumnGrid& grid, const ColumnRows& rows, const ColumnBlock& block, const float* hessian,
                float* rounded, float* residual);
};

extern const ColumnKernels column_kernels_scalar;
extern const ColumnKernels column_kernels_avx2;
extern const ColumnKernels column_kernels_avx512;

// Of the instruction set `isa`, one of kernels/dispatch.h's; all give the same bits.
const ColumnKernels& column_kernels(const std::string& isa);

}  // namespace quern
