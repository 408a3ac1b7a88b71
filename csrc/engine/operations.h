// Elementwise and attention arithmetic of a decoder in float32, one table of functions for each instruction set. All of
// them add in the same order, so that the results are the same bit for bit.
#pragma once

#include <cstdint>

namespace quern {

// Positions of a key block. Keys of 16 positions lie side by side, so that 16 scores are computed at once.
constexpr int32_t BLOCK = 16;

// What the gate of an MLP goes through: x sigmoid(x), x Phi(x) with the normal distribution function, or with its
// approximation by a hyperbolic tangent (Hendrycks and Gimpel 2016, arXiv 1606.08415).
enum class Activation : int32_t { silu = 0, gelu = 1, gelu_tanh = 2 };

// How keys and values are kept; the number is the bits of one.
enum class CachePrecision : int32_t { int4 = 4, int8 = 8, float16 = 16, float32 = 32 };

// Channels of a head that share a scale in an int4 cache; the last ones of a head may be fewer.
constexpr int32_t CODE_GROUP = 32;
inline int32_t code_groups(int32_t head_dim) { return (head_dim + CODE_GROUP - 1) / CODE_GROUP; }

// Where keys and values of BLOCK positions of all layers begin; see cache.h.
struct KeyValuePage {
  uint8_t* keys;
  uint8_t* values;
};

// What attention reads of one key/value head of one sequence.
struct HeadCache {
  int32_t head_dim;      // a multiple of 2
  int32_t depth;         // numbers that a score is a sum of: head_dim, or twice that where cosines and sines take part
  CachePrecision precision;
  const KeyValuePage* pages;  // of BLOCK positions each
  // Bytes from there to keys (head_dim, BLOCK) and values (BLOCK, head_dim), as cache.h says. Behind the codes their scales:
  // int8: (BLOCK,), float32; int4: of keys (groups, BLOCK), of values (BLOCK, groups), float16. A byte of int4 codes holds two
  // channels of one position: channel j of a group of n in the low half, j + n / 2 in the high half, both plus 8.
  int64_t keys_at, values_at;
  const float* cosines;      // (blocks, head_dim / 2, BLOCK)
  const float* sines;
};

// Queries that share a key/value head: row r sees the positions first[r] ... last[r].
struct Attend {
  HeadCache cache;
  const float* queries;  // (rows, depth): rotated and scaled by 1 / sqrt(head_dim); then what cosines and sines are multiplied by
  const int32_t* first;
  const int32_t* last;
  int32_t rows;
  float* outputs;        // (rows, head_dim)
  float* scratch;        // attend_scratch(rows, head_dim, depth) floats
};

inline int64_t attend_scratch(int32_t rows, int32_t head_dim, int32_t depth) {
  constexpr int64_t positions = 4 * BLOCK;
  const int64_t sixteens = (rows + 15) / 16;
  return positions * (depth + head_dim + 2 * BLOCK) + 32 * positions + 16 * sixteens * (depth + head_dim + 4);
}

struct Operations {
  // out = x / sqrt(mean(x^2) + epsilon) * weight
  void (*rms_norm)(const float* x, const float* weight, int32_t count, float epsilon, float* out);
  // gate = f(gate) * up, and x = f(x): one function for each `Activation`
  void (*gated_product[3])(float* gate, const float* up, int32_t count);
  void (*activated[3])(float* x, int32_t count);
  // x += y, and x += y * factor
  void (*add)(float* x, const float* y, int64_t count);
  void (*add_scaled)(float* x, const float* y, float factor, int64_t count);
  // x = e^(x - maximum); returns the sum of these.
  float (*exponentials)(float* x, float maximum, int32_t count);
  // Softmax attention of some rows (online: Milakov and Gimelshein 2018, arXiv 1805.02867).
  void (*attend)(const Attend& arguments);
  void (*to_float16)(const float* x, uint16_t* out, int32_t count);
  void (*from_float16)(const uint16_t* x, float* out, int32_t count);
};

// Of the instruction set in use (kernels/dispatch.h).
const Operations& operations();

extern const Operations operations_scalar;
extern const Operations operations_avx2;
extern const Operations operations_avx512;
extern const Operations operations_neon;

}  // namespace quern
