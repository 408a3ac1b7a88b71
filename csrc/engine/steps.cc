#include "engine/steps.h"

#include <stdexcept>
#include <string>

#include "kernels/kind.h"

namespace quern {
namespace {

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

int32_t width_of(const DecoderShape& shape, int32_t buffer) {
  const int32_t count = static_cast<int32_t>(shape.widths.size());
  require(buffer >= 0 && buffer < count, "a step names buffer " + std::to_string(buffer) + "; there are " + std::to_string(count));
  return shape.widths[buffer];
}

int32_t rotary_dim(const DecoderShape& shape, int32_t rotary) {
  require(rotary >= 0 && rotary < static_cast<int32_t>(shape.rotaries.size()), "a step names rotary positions that there are not");
  return 2 * static_cast<int32_t>(shape.rotaries[rotary].frequencies[0].size());
}

const CacheLayer& layer_of(const DecoderShape& shape, int32_t layer) {
  require(layer >= 0 && layer < static_cast<int32_t>(shape.layers.size()), "a step names a layer that keeps no keys and values");
  return shape.layers[layer];
}

void check_heads(const DecoderShape& shape, const CacheLayer& kept, int32_t rotary, const float* bias, int64_t bias_size) {
  require(rotary_dim(shape, rotary) == kept.head_dim, "one rotary frequency for two channels of a head");
  require(bias == nullptr || bias_size == static_cast<int64_t>(kept.heads) * kept.head_dim, "a bias has one number a row");
}

}  // namespace

void Embed::check(const DecoderShape& shape) const {
  require(table.rows == shape.vocabulary && table.columns == width_of(shape, to), "embedding and head are vocabulary x hidden");
}

void Embed::run_row(const Batch& batch, int64_t token) const {
  table.kind->decode(table, batch.rows[token].token, batch.row(to, token));
}

void Norm::check(const DecoderShape& shape) const {
  const int32_t width = width_of(shape, from);
  require(width == width_of(shape, to) && count > 0 && width % count == 0, "a norm has one weight a channel, or a head's channel");
}

void Norm::run_row(const Batch& batch, int64_t token) const {
  const float* x = batch.row(from, token);
  float* out = batch.row(to, token);
  for (int32_t at = 0; at < batch.shape.widths[from]; at += count)
    batch.operations.rms_norm(x + at, weight, count, epsilon, out + at);
}

void Project::check(const DecoderShape& shape) const {
  require(!linears.empty() && linears.size() == to.size(), "one buffer a linear, and at least one");
  for (size_t i = 0; i < linears.size(); ++i) {
    const Weight& w = linears[i].weight;
    require(w.columns == width_of(shape, from) && w.rows == width_of(shape, to[i]),
            "a linear of a block has a shape that the config denies");
  }
}

void Project::run(const Batch& batch) const {
  std::vector<const Linear*> pointers;
  std::vector<float*> outputs;
  for (size_t i = 0; i < linears.size(); ++i) {
    pointers.push_back(&linears[i]);
    outputs.push_back(batch.row(to[i], 0));
  }
  batch.projector.project(batch.row(from, 0), pointers, outputs, batch.tokens());
}

void Rotate::check(const DecoderShape& shape) const {
  require(width_of(shape, buffer) % rotary_dim(shape, rotary) == 0, "one rotary frequency for two channels of a head");
}

void Rotate::run_row(const Batch& batch, int64_t token) const {
  const Row& row = batch.rows[token];
  const Rotary& turn = batch.rotaries[rotary];
  turn.rotate(row.cache->rotary(), batch.row(buffer, token), batch.shape.widths[buffer] / turn.head_dim(), row.position, scale);
}

void Store::check(const DecoderShape& shape) const {
  const CacheLayer& kept = layer_of(shape, layer);
  const int32_t width = kept.heads * kept.head_dim;
  require(width_of(shape, keys) == width && width_of(shape, values) == width, "keys and values have the width of their cache");
  check_heads(shape, kept, rotary, key_bias, bias_size);
}

void Store::run_row(const Batch& batch, int64_t token) const {
  const Row& row = batch.rows[token];
  float* key = batch.row(keys, token);
  if (key_bias != nullptr && !row.cache->integers()) batch.operations.add(key, key_bias, batch.shape.widths[keys]);
  batch.rotaries[rotary].rotate(row.cache->rotary(), key, batch.shape.layers[layer].heads, row.position, 1.0f);
  row.cache->put(batch.operations, layer, row.position, key, batch.row(values, token));
}

void Activate::check(const DecoderShape& shape) const {
  const int32_t width = width_of(shape, gate);
  require(up < 0 || width_of(shape, up) == width, "a gate is as wide as what it gates");
}

void Activate::run_row(const Batch& batch, int64_t token) const {
  const int32_t function = static_cast<int32_t>(activation), width = batch.shape.widths[gate];
  if (up < 0) {
    batch.operations.activated[function](batch.row(gate, token), width);
  } else {
    batch.operations.gated_product[function](batch.row(gate, token), batch.row(up, token), width);
  }
}

void Add::check(const DecoderShape& shape) const {
  require(width_of(shape, from) == width_of(shape, to), "what is added is as wide as what it is added to");
}

void Add::run_row(const Batch& batch, int64_t token) const {
  batch.operations.add(batch.row(to, token), batch.row(from, token), batch.shape.widths[to]);
}

void AttendStep::check(const DecoderShape& shape) const {
  const CacheLayer& kept = layer_of(shape, layer);
  const int32_t width = width_of(shape, queries);
  require(width == width_of(shape, to) && width % (kept.heads * kept.head_dim) == 0,
          "query heads must be a multiple of key/value heads");
  check_heads(shape, kept, rotary, key_bias, bias_size);
  require(window >= 0, "a window has at least one position, or is 0 for all");
}

}  // namespace quern
