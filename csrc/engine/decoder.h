// A decoder-only transformer of the Llama family (grouped-query attention, gated MLP, RMSNorm, rotary positions) on packed
// weights. The residual stream and everything between the products is float32.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "engine/cache.h"
#include "engine/operations.h"
#include "kernels/matmul.h"

namespace quern {

struct DecoderShape {
  int32_t hidden, intermediate, layers, heads, key_value_heads, head_dim, vocabulary;
  float epsilon;            // of the norms
  Activation activation;    // of the MLPs
  std::vector<int32_t> windows;    // (layers,): positions that attention sees back, itself included; 0: all
  float rotary_factor;      // cosines and sines are multiplied by it (1 but for some scaling variants)
  // Sets of (head_dim / 2,): angle of a position = position * frequency. A cache says by which set its sequence goes.
  std::vector<std::vector<float>> frequencies;
};

// A linear: packed weight, bias (rows,) or null, and the signs of its inputs' rotation (see `rotate`) or null. The arrays
// are the caller's and must outlive the decoder.
struct Linear {
  Weight weight;
  const float* bias = nullptr;
  const uint8_t* signs = nullptr;
  bool fine = false;  // inputs as two int8 numbers each: the ordinary one, and what it left over
};

struct DecoderBlock {
  const float* input_norm;
  const float* output_norm;           // before the MLP
  const float* query_norm = nullptr;  // (head_dim,) or null
  const float* key_norm = nullptr;
  Linear query, key, value, output, gate, up, down;
};

// Rotation by position: (positions / BLOCK, head_dim / 2, BLOCK), as attention reads them for int8 keys.
struct RotaryTable {
  std::vector<float> cosines, sines;
};

// One token at the next position of a sequence.
struct Row {
  SequenceCache* cache;
  int32_t position;
  int32_t token;
};

class Decoder {
 public:
  Decoder(DecoderShape shape, std::vector<DecoderBlock> blocks, Weight embedding, const float* final_norm, Linear head,
          int threads);

  const DecoderShape& shape() const { return shape_; }
  ThreadPool& pool() { return pool_; }

  // Feed some tokens, of one sequence or of several; those of one sequence follow each other at rising positions, and
  // their caches have pages for them. Leaves the hidden states (rows, hidden) in `hidden` after the final norm.
  void forward(const std::vector<Row>& rows, std::vector<float>& hidden);

  // Logits (rows, vocabulary) of hidden states.
  void logits(const float* hidden, int32_t rows, float* out);

 private:
  void attention(const DecoderBlock& block, int32_t layer, const std::vector<Row>& rows);
  void project(const float* inputs, const std::vector<const Linear*>& linears, const std::vector<float*>& outputs,
               int32_t tokens);
  void multiply_fine(std::vector<Product>& products);
  void normalize(const float* weight, const std::vector<float>& from, int32_t tokens, std::vector<float>& to);
  void extend_tables(int32_t rotary, int32_t positions);
  void rotate_heads(const RotaryTable& table, float* states, int32_t heads, int32_t position, float scale) const;

  DecoderShape shape_;
  std::vector<DecoderBlock> blocks_;
  Weight embedding_;
  const float* final_norm_;
  Linear head_;
  ThreadPool pool_;
  const Operations* operations_;
  std::vector<RotaryTable> tables_;  // one for each set of frequencies
  Activations activations_;
  std::vector<float> both_, sums_;  // inputs and what their int8 values leave over; products of both
  std::vector<float> rotated_, normed_, queries_, keys_, values_, attended_, gate_, up_, branch_;
  std::vector<float> scratch_;
};

}  // namespace quern
