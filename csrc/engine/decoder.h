// A decoder: a list of steps on packed weights, and a head. Everything between the products is float32.
#pragma once

#include <memory>
#include <vector>

#include "engine/steps.h"

namespace quern {

class Decoder {
 public:
  // `output`: the buffer that the head reads. Throws std::invalid_argument where a step does not fit.
  Decoder(DecoderShape shape, std::vector<std::shared_ptr<const Step>> steps, int32_t output, Linear head, int threads);

  const DecoderShape& shape() const { return shape_; }
  const std::vector<std::shared_ptr<const Step>>& steps() const { return steps_; }
  int32_t output() const { return output_; }
  const Linear& head() const { return head_; }
  int32_t width() const { return shape_.widths[output_]; }
  ThreadPool& pool() { return pool_; }

  // Feed some tokens, of one sequence or of several; those of one sequence follow each other at rising positions, and
  // their caches have pages for them. Returns the output buffer (rows, width), valid until the next call.
  float* forward(const std::vector<Row>& rows);

  // Logits (rows, vocabulary) of rows of the output buffer.
  void logits(const float* hidden, int32_t rows, float* out);

 private:
  DecoderShape shape_;
  std::vector<std::shared_ptr<const Step>> steps_;
  int32_t output_;
  Linear head_;
  ThreadPool pool_;
  const Operations& operations_;
  Projector projector_;
  std::vector<Rotary> rotaries_;
  std::vector<std::vector<float>> buffers_;
  std::vector<float> scratch_;
};

}  // namespace quern
