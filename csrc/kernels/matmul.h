// Products of packed weights and activations; what the engine calls.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/scratch.h"
#include "kernels/threads.h"
#include "kernels/weight.h"

namespace quern {

// Inputs of some tokens, quantized to int8 with one scale for each token and group of columns:
// x = values * scale. The plain kinds (bfloat16, float32) read `exact` instead.
struct Activations {
  int32_t tokens = 0, columns = 0, group = 0;
  int64_t stride = 0;              // bytes from one token to the next: columns and at least a register of zeros; an odd
                                   // number of registers, so that tokens do not compete for the same lines of the cache
  Lines<int8_t> values;            // (tokens, stride)
  int64_t half = 0;                // bytes of `halves` for one token and parity
  Lines<int8_t> halves;            // (tokens, 2, half): values of even columns, then of odd ones; where rows want it
  Lines<int8_t> quarters;          // (tokens, 4, half / 2): values of columns 0, 4, 8 ..., then 1, 5, 9 ...; the same
  Lines<float> scale;              // (tokens, groups)
  Lines<int32_t> sums;             // (tokens, groups): sum of the values of each group
  const float* exact = nullptr;    // (tokens, columns), the caller's; must outlive this
};

// What `weight` wants of its activations' groups: its own where it has any, else the whole row.
int32_t activation_group(const Weight& weight);

// Where the scales of inputs come from.
struct InputScale {
  float given = 0.0f;  // above 0: of all inputs (static); values beyond it end at -127 and 127
  bool whole = false;  // else: from all columns of a token, also where the weight has groups

  bool operator==(const InputScale& other) const { return given == other.given && whole == other.whole; }
};

// Quantize float32 `inputs` (tokens, columns), ties to even. Where no scale is given, the greatest |x| of a group, or of a whole
// token, becomes 127. `halves` and `quarters` are made where row kernels want them of so many tokens, or of any with `for_few`.
void quantize(ThreadPool& pool, const float* inputs, int32_t tokens, int32_t columns, int32_t group, Activations& out,
              InputScale from = {}, bool for_few = false);

// Some tokens of activations that were quantized `for_few`, in the order of `tokens`; `exact` stays as it was.
void gather(ThreadPool& pool, const Activations& from, const std::vector<int32_t>& tokens, Activations& out);

// Greatest `columns` of a weight: beyond it sums of products might not fit 32 bits.
constexpr int32_t MAX_COLUMNS = 65536;

// Tokens [first, first + tokens) of activations.
struct Slice {
  const Activations* of;
  int32_t first, tokens;
};

// outputs (tokens, rows) float32 of a matrix.
struct Product {
  const Weight* weight;
  float* outputs;
  Slice inputs{};
};
// Several products as one piece of parallel work. Throws std::invalid_argument where a weight does not fit its activations.
void multiply(ThreadPool& pool, const std::vector<Product>& products);
// The same where all of them read all tokens of `activations`.
void multiply(ThreadPool& pool, std::vector<Product> products, const Activations& activations);

// In-place orthonormal block Hadamard transform of the rows of `values` (tokens, columns), each first multiplied by its
// column's sign (bit c % 8 of signs[c / 8] set: -1). Blocks are the largest power of two that divides `columns`.
void rotate(ThreadPool& pool, float* values, int32_t tokens, int32_t columns, const uint8_t* signs);
// The same of one row.
void rotate_row(float* values, int32_t columns, const uint8_t* signs);

}  // namespace quern
