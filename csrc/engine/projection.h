// Products of linears with the same inputs: rotating and quantizing in front of them, biases behind.
#pragma once

#include <cstdint>
#include <deque>
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
// A linear of some rows of inputs.
struct Visit {
  const Linear* linear;
  const float* inputs;    // (tokens, columns)
  int32_t tokens;
  const int32_t* rows;    // (count,) of them
  int32_t count;
  float* outputs;         // (count, rows of the linear)
};

// Memory is kept from one call to the next.
class Projector {
 public:
  Projector(ThreadPool& pool, const Operations& operations) : pool_(pool), operations_(operations) {}

  // outputs[i] (tokens, rows of linear i) of inputs (tokens, columns). Linears that want their inputs rotated or quantized alike
  // share that work and run as one piece of parallel work.
  void project(const float* inputs, const std::vector<const Linear*>& linears, const std::vector<float*>& outputs,
               int32_t tokens);

  // Linears that read few of their inputs' rows each, as experts do: their products run as one piece of parallel work. Visits
  // that follow each other and read the same rows share what is done to them.
  void visit(const std::vector<Visit>& visits);

 private:
  // Inputs of visits that want them alike.
  struct Prepared {
    std::vector<float> rows, both;
    Activations all, some;
    std::vector<float> sums;  // products of fine inputs
  };

  void multiply_fine(std::vector<Product>& products);
  void add_rests(Activations& activations, std::vector<float>& both);
  void prepare(const std::vector<const Visit*>& visits, Prepared& prepared, std::vector<Product>& products);
  void finish(const Visit& visit, const float* sums);

  ThreadPool& pool_;
  const Operations& operations_;
  Activations activations_;
  std::vector<float> rotated_, both_, sums_;  // both: inputs and what their int8 values leave over; sums: products of both
  std::deque<Prepared> prepared_;
};

}  // namespace quern
