// Products of linears with the same inputs: rotating and quantizing in front of them, biases behind.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/operations.h"
#include "kernels/matmul.h"

namespace quern {

// A linear: packed weight, bias (rows,) or null, and the signs of its inputs' rotation (see `rotate`) or null. The arrays
// are the caller's and must outlive it.
struct Linear {
  Weight weight;
  const float* bias = nullptr;
  const uint8_t* signs = nullptr;
  bool fine = false;  // inputs as two int8 numbers each: the ordinary one, and what it left over; from their groups' scales
  InputScale input;
};

// Throws std::invalid_argument for arrays of another size than the weight calls for (0 where there are none), and for scales of
// inputs that are no scales.
void check(const Linear& linear, int64_t bias_size, int64_t sign_bytes);

// Memory is kept from one call to the next.
class Projector {
 public:
  Projector(ThreadPool& pool, const Operations& operations) : pool_(pool), operations_(operations) {}

  // outputs[i] (tokens, rows of linear i) of inputs (tokens, columns). Linears that want their inputs rotated or quantized alike
  // share that work and run as one piece of parallel work.
  void project(const float* inputs, const std::vector<const Linear*>& linears, const std::vector<float*>& outputs,
               int32_t tokens);

 private:
  void multiply_fine(std::vector<Product>& products);

  ThreadPool& pool_;
  const Operations& operations_;
  Activations activations_;
  std::vector<float> rotated_, both_, sums_;  // both: inputs and what their int8 values leave over; sums: products of both
};

}  // namespace quern
