#include "engine/decoder.h"

#include <stdexcept>

namespace quern {
namespace {

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

void check(const DecoderShape& shape) {
  for (const int32_t width : shape.widths) require(width > 0, "a buffer has at least one number a token");
  for (const CacheLayer& layer : shape.layers) {
    require(layer.heads > 0, "there must be at least one key/value head");
    require(layer.head_dim > 0 && layer.head_dim % 2 == 0, "head_dim must be even");
  }
  for (const RotaryShape& rotary : shape.rotaries) {
    require(!rotary.frequencies.empty(), "at least one set of rotary frequencies");
    for (const auto& set : rotary.frequencies)
      require(!set.empty() && set.size() == rotary.frequencies[0].size(), "sets of rotary frequencies have one size");
  }
}

}  // namespace

Decoder::Decoder(DecoderShape shape, std::vector<std::shared_ptr<const Step>> steps, int32_t output, Linear head, int threads)
    : shape_(std::move(shape)),
      steps_(std::move(steps)),
      output_(output),
      head_(head),
      pool_(threads),
      operations_(operations()),
      projector_(pool_, operations_),
      buffers_(shape_.widths.size()) {
  check(shape_);
  for (const auto& step : steps_) step->check(shape_);
  require(output >= 0 && output < static_cast<int32_t>(shape_.widths.size()), "the head reads a buffer that there is not");
  require(head_.weight.rows == shape_.vocabulary && head_.weight.columns == width(), "embedding and head are vocabulary x hidden");
  for (const RotaryShape& rotary : shape_.rotaries) rotaries_.emplace_back(rotary);
}

float* Decoder::forward(const std::vector<Row>& rows) {
  const int64_t tokens = static_cast<int64_t>(rows.size());
  for (Rotary& rotary : rotaries_)
    for (const Row& row : rows) rotary.extend(row.cache->rotary(), row.position + 1);
  for (size_t i = 0; i < buffers_.size(); ++i) buffers_[i].resize(tokens * shape_.widths[i]);
  const Batch batch{shape_, rows, rotaries_, operations_, pool_, projector_, buffers_, scratch_};
  for (size_t i = 0; i < steps_.size();) {
    if (!steps_[i]->by_row()) {
      steps_[i++]->run(batch);
      continue;
    }
    size_t end = i;
    while (end < steps_.size() && steps_[end]->by_row()) ++end;
    pool_.each(tokens, [&](int64_t t) {
      for (size_t j = i; j < end; ++j) steps_[j]->run_row(batch, t);
    });
    i = end;
  }
  for (const Row& row : rows) row.cache->filled(row.position + 1);
  return buffers_[output_].data();
}

void Decoder::logits(const float* hidden, int32_t rows, float* out) {
  projector_.project(hidden, {&head_}, {out}, rows);
}

}  // namespace quern
