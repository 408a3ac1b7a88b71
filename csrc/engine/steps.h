// The steps that a decoder is a list of. They work on buffers, which have a row of numbers for each token and are named by
// their index. A family of models is a list of steps, made in Python (engines/_cpu_layers.py).
#pragma once

#include <cstdint>
#include <vector>

#include "engine/cache.h"
#include "engine/operations.h"
#include "engine/projection.h"
#include "engine/rotary.h"

namespace quern {

struct DecoderShape {
  std::vector<int32_t> widths;       // of the buffers
  std::vector<CacheLayer> layers;    // whose keys and values are kept
  std::vector<RotaryShape> rotaries;
  int32_t vocabulary;
};

// One token at the next position of a sequence.
struct Row {
  SequenceCache* cache;
  int32_t position;
  int32_t token;
};

// Tokens that go through the steps together, of one sequence or of several.
struct Batch {
  const DecoderShape& shape;
  const std::vector<Row>& rows;
  const std::vector<Rotary>& rotaries;
  const Operations& operations;
  ThreadPool& pool;
  Projector& projector;
  std::vector<std::vector<float>>& buffers;
  std::vector<float>& scratch;

  int32_t tokens() const { return static_cast<int32_t>(rows.size()); }
  float* row(int32_t buffer, int64_t token) const { return buffers[buffer].data() + token * shape.widths[buffer]; }
};

class Step {
 public:
  virtual ~Step() = default;
  // Throws std::invalid_argument where it does not fit the decoder.
  virtual void check(const DecoderShape& shape) const = 0;
  // Whether it takes every token by itself; such steps that follow each other are one piece of parallel work.
  virtual bool by_row() const { return true; }
  virtual void run_row(const Batch&, int64_t) const {}
  virtual void run(const Batch&) const {}
};

// to = the rows of a table for the tokens.
struct Embed : Step {
  Embed(const Weight& table, int32_t to) : table(table), to(to) {}
  void check(const DecoderShape& shape) const override;
  void run_row(const Batch& batch, int64_t token) const override;

  Weight table;
  int32_t to;
};

// to = from / sqrt(mean(from^2) + epsilon) * weight, for every `count` numbers of a row by themselves (a head's, or all).
struct Norm : Step {
  Norm(int32_t from, int32_t to, const float* weight, int32_t count, float epsilon)
      : from(from), to(to), weight(weight), count(count), epsilon(epsilon) {}
  void check(const DecoderShape& shape) const override;
  void run_row(const Batch& batch, int64_t token) const override;

  int32_t from, to;
  const float* weight;
  int32_t count;
  float epsilon;
};

// to[i] = linear i of from.
struct Project : Step {
  Project(int32_t from, std::vector<Linear> linears, std::vector<int32_t> to)
      : from(from), linears(std::move(linears)), to(std::move(to)) {}
  void check(const DecoderShape& shape) const override;
  bool by_row() const override { return false; }
  void run(const Batch& batch) const override;

  int32_t from;
  std::vector<Linear> linears;
  std::vector<int32_t> to;
};

// Heads of a buffer rotated by position and multiplied by `scale`.
struct Rotate : Step {
  Rotate(int32_t buffer, int32_t rotary, float scale) : buffer(buffer), rotary(rotary), scale(scale) {}
  void check(const DecoderShape& shape) const override;
  void run_row(const Batch& batch, int64_t token) const override;

  int32_t buffer, rotary;
  float scale;
};

// Keys, rotated, and values into the cache of a layer; the buffers may be overwritten. A bias of the keys (or null) is added first
// where the cache does not keep it apart (cache.h); `Attend` has it then.
struct Store : Step {
  Store(int32_t layer, int32_t keys, int32_t values, const float* key_bias, int64_t bias_size, int32_t rotary)
      : layer(layer), keys(keys), values(values), key_bias(key_bias), bias_size(bias_size), rotary(rotary) {}
  void check(const DecoderShape& shape) const override;
  void run_row(const Batch& batch, int64_t token) const override;

  int32_t layer, keys, values;
  const float* key_bias;
  int64_t bias_size;
  int32_t rotary;
};

// Softmax attention of rotated, scaled queries over what a layer's cache holds. `window`: positions seen back, itself included;
// 0: all.
struct AttendStep : Step {
  AttendStep(int32_t layer, int32_t queries, int32_t to, int32_t window, const float* key_bias, int64_t bias_size,
             int32_t rotary)
      : layer(layer), queries(queries), to(to), window(window), key_bias(key_bias), bias_size(bias_size), rotary(rotary) {}
  void check(const DecoderShape& shape) const override;
  bool by_row() const override { return false; }
  void run(const Batch& batch) const override;

  int32_t layer, queries, to, window;
  const float* key_bias;
  int64_t bias_size;
  int32_t rotary;

 private:
  void piece(const Batch& batch, int32_t head, int32_t from, int32_t end, float* space) const;
  // Queries of a head as attention reads them: through the cache's transform; a bias that is kept apart appended.
  void prepare(const SequenceCache& cache, const float* query, int32_t depth, const float* bias, float* to) const;
};

// gate = f(gate) * up, or without `up` (-1) gate = f(gate).
struct Activate : Step {
  Activate(Activation activation, int32_t gate, int32_t up) : activation(activation), gate(gate), up(up) {}
  void check(const DecoderShape& shape) const override;
  void run_row(const Batch& batch, int64_t token) const override;

  Activation activation;
  int32_t gate, up;
};

// to += from.
struct Add : Step {
  Add(int32_t from, int32_t to) : from(from), to(to) {}
  void check(const DecoderShape& shape) const override;
  void run_row(const Batch& batch, int64_t token) const override;

  int32_t from, to;
};

}  // namespace quern
