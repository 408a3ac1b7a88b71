#include "engine/decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/kind.h"

namespace quern {
namespace {

constexpr int32_t QUERY_ROWS = 32;  // tokens whose queries attention takes through a stretch of keys together

bool plain(const Weight& weight) { return weight.kind->plain; }

bool same_inputs(const Linear& a, const Linear& b) {
  if (plain(a.weight) != plain(b.weight)) return false;
  if ((a.signs == nullptr) != (b.signs == nullptr) || a.fine != b.fine) return false;
  if (a.signs != nullptr && memcmp(a.signs, b.signs, (a.weight.columns + 7) / 8) != 0) return false;
  return plain(a.weight) || activation_group(a.weight) == activation_group(b.weight);
}

}  // namespace

Decoder::Decoder(DecoderShape shape, std::vector<DecoderBlock> blocks, Weight embedding, const float* final_norm,
                 Linear head, int threads)
    : shape_(std::move(shape)),
      blocks_(std::move(blocks)),
      embedding_(embedding),
      final_norm_(final_norm),
      head_(head),
      pool_(threads),
      operations_(&operations()),
      tables_(shape_.frequencies.size()) {}

// Products of linears that read the same inputs. Those that want them rotated or quantized alike share that work and run
// as one piece of parallel work.
void Decoder::project(const float* inputs, const std::vector<const Linear*>& linears, const std::vector<float*>& outputs,
                      int32_t tokens) {
  std::vector<bool> done(linears.size());
  for (size_t i = 0; i < linears.size(); ++i) {
    if (done[i]) continue;
    const Linear& lead = *linears[i];
    const int32_t columns = lead.weight.columns;
    std::vector<Product> products;
    for (size_t j = i; j < linears.size(); ++j)
      if (!done[j] && same_inputs(lead, *linears[j])) {
        products.push_back({&linears[j]->weight, outputs[j]});
        done[j] = true;
      }
    const float* read = inputs;
    if (lead.signs != nullptr) {
      rotated_.assign(inputs, inputs + static_cast<int64_t>(tokens) * columns);
      rotate(pool_, rotated_.data(), tokens, columns, lead.signs);
      read = rotated_.data();
    }
    if (plain(lead.weight)) {
      activations_.tokens = tokens;
      activations_.columns = activations_.group = columns;
    } else {
      quantize(pool_, read, tokens, columns, activation_group(lead.weight), activations_);
    }
    activations_.exact = read;
    if (lead.fine) {
      multiply_fine(products);
    } else {
      multiply(pool_, products, activations_);
    }
  }
  for (size_t i = 0; i < linears.size(); ++i)
    if (linears[i]->bias != nullptr)
      for (int32_t t = 0; t < tokens; ++t)
        operations_->add(outputs[i] + static_cast<int64_t>(t) * linears[i]->weight.rows, linears[i]->bias,
                         linears[i]->weight.rows);
}

// The products of activations_, and of what quantizing those left over, as if it were more tokens: the weights are read
// once. The sum is as exact as inputs of about 15 bits.
void Decoder::multiply_fine(std::vector<Product>& products) {
  const int32_t tokens = activations_.tokens, columns = activations_.columns, group = activations_.group;
  const int32_t groups = (columns + group - 1) / group;
  const int64_t size = static_cast<int64_t>(tokens) * columns;
  both_.resize(2 * size);
  pool_.each(tokens, [&](int64_t t) {
    const float* x = activations_.exact + t * columns;
    const int8_t* values = activations_.values.data() + t * activations_.stride;
    const float* scale = activations_.scale.data() + t * groups;
    float* rest = both_.data() + size + t * columns;
    memcpy(both_.data() + t * columns, x, sizeof(float) * columns);
    for (int32_t g = 0; g < groups; ++g)
      for (int32_t c = g * group; c < std::min(columns, (g + 1) * group); ++c)
        rest[c] = x[c] - scale[g] * static_cast<float>(values[c]);
  });
  quantize(pool_, both_.data(), 2 * tokens, columns, group, activations_);
  int64_t rows = 0;
  for (const Product& product : products) rows += product.weight->rows;
  sums_.resize(2 * tokens * rows);
  std::vector<Product> doubled;
  float* to = sums_.data();
  for (const Product& product : products) {
    doubled.push_back({product.weight, to});
    to += 2 * static_cast<int64_t>(tokens) * product.weight->rows;
  }
  multiply(pool_, doubled, activations_);
  for (size_t i = 0; i < products.size(); ++i) {
    const int64_t count = static_cast<int64_t>(tokens) * products[i].weight->rows;
    memcpy(products[i].outputs, doubled[i].outputs, sizeof(float) * count);
    operations_->add(products[i].outputs, doubled[i].outputs + count, count);
  }
}

void Decoder::normalize(const float* weight, const std::vector<float>& from, int32_t tokens, std::vector<float>& to) {
  const int64_t hidden = shape_.hidden;
  to.resize(tokens * hidden);
  pool_.each(tokens, [&](int64_t t) {
    operations_->rms_norm(from.data() + t * hidden, weight, shape_.hidden, shape_.epsilon, to.data() + t * hidden);
  });
}

void Decoder::extend_tables(int32_t rotary, int32_t positions) {
  const std::vector<float>& frequencies = shape_.frequencies[rotary];
  RotaryTable& table = tables_[rotary];
  const int32_t half = shape_.head_dim / 2;
  const int64_t blocks = (positions + BLOCK - 1) / BLOCK, before = table.cosines.size() / (half * BLOCK);
  if (blocks <= before) return;
  const int64_t after = std::max(blocks, 2 * before);
  table.cosines.resize(after * half * BLOCK);
  table.sines.resize(after * half * BLOCK);
  for (int64_t b = before; b < after; ++b)
    for (int32_t d = 0; d < half; ++d)
      for (int32_t p = 0; p < BLOCK; ++p) {
        const float angle = static_cast<float>(b * BLOCK + p) * frequencies[d];
        const int64_t place = (b * half + d) * BLOCK + p;
        table.cosines[place] = std::cos(angle) * shape_.rotary_factor;
        table.sines[place] = std::sin(angle) * shape_.rotary_factor;
      }
}

void Decoder::rotate_heads(const RotaryTable& table, float* states, int32_t heads, int32_t position,
                           float scale) const {
  const int32_t half = shape_.head_dim / 2;
  const int64_t place = static_cast<int64_t>(position / BLOCK) * half * BLOCK + position % BLOCK;
  for (int32_t h = 0; h < heads; ++h) {
    float* head = states + static_cast<int64_t>(h) * shape_.head_dim;
    for (int32_t d = 0; d < half; ++d) {
      const float c = table.cosines[place + d * BLOCK] * scale, s = table.sines[place + d * BLOCK] * scale;
      const float x = head[d], y = head[d + half];
      head[d] = x * c - y * s;
      head[d + half] = y * c + x * s;
    }
  }
}

// Queries, keys and values of normed_ to attended_ (tokens, heads * head_dim).
void Decoder::attention(const DecoderBlock& block, int32_t layer, const std::vector<Row>& rows) {
  const int32_t tokens = static_cast<int32_t>(rows.size()), size = shape_.head_dim;
  const int64_t query_width = static_cast<int64_t>(shape_.heads) * size;
  const int64_t key_width = static_cast<int64_t>(shape_.key_value_heads) * size;
  queries_.resize(tokens * query_width);
  keys_.resize(tokens * key_width);
  values_.resize(tokens * key_width);
  attended_.resize(tokens * query_width);
  const bool bare = rows[0].cache->bare_keys();
  const bool biased = bare && block.key_norm == nullptr;  // by attention; a norm's outputs hold the bias already
  Linear key = block.key;
  if (biased) key.bias = nullptr;
  project(normed_.data(), {&block.query, &key, &block.value}, {queries_.data(), keys_.data(), values_.data()}, tokens);
  const float factor = 1.0f / std::sqrt(static_cast<float>(size));
  pool_.each(tokens, [&](int64_t t) {
    float* q = queries_.data() + t * query_width;
    float* k = keys_.data() + t * key_width;
    if (block.query_norm != nullptr)
      for (int32_t h = 0; h < shape_.heads; ++h)
        operations_->rms_norm(q + h * size, block.query_norm, size, shape_.epsilon, q + h * size);
    if (block.key_norm != nullptr)
      for (int32_t h = 0; h < shape_.key_value_heads; ++h)
        operations_->rms_norm(k + h * size, block.key_norm, size, shape_.epsilon, k + h * size);
    const RotaryTable& table = tables_[rows[t].cache->rotary()];
    rotate_heads(table, q, shape_.heads, rows[t].position, factor);
    if (!bare) rotate_heads(table, k, shape_.key_value_heads, rows[t].position, 1.0f);
    rows[t].cache->put(*operations_, layer, rows[t].position, k, values_.data() + t * key_width);
  });

  // Pieces: up to QUERY_ROWS tokens of one sequence, and one key/value head with the query heads that share it.
  std::vector<int32_t> starts;
  for (int32_t t = 0; t < tokens; ++t)
    if (t == 0 || rows[t].cache != rows[t - 1].cache || t - starts.back() == QUERY_ROWS) starts.push_back(t);
  starts.push_back(tokens);
  const int32_t window = shape_.windows[layer];
  const int32_t share = shape_.heads / shape_.key_value_heads, most = QUERY_ROWS * share;
  const int64_t stretch = attend_scratch(most, size) + 2 * static_cast<int64_t>(most) * size + 2 * most;
  const int64_t pieces = static_cast<int64_t>(starts.size() - 1) * shape_.key_value_heads;
  scratch_.resize(pieces * stretch);
  pool_.each(pieces, [&](int64_t piece) {
    const int32_t head = static_cast<int32_t>(piece % shape_.key_value_heads);
    const int32_t from = starts[piece / shape_.key_value_heads], to = starts[piece / shape_.key_value_heads + 1];
    float* space = scratch_.data() + piece * stretch;
    float* queries = space + attend_scratch(most, size);
    float* outputs = queries + static_cast<int64_t>(most) * size;
    int32_t* last = reinterpret_cast<int32_t*>(outputs + static_cast<int64_t>(most) * size);
    int32_t* first = last + most;
    Attend a{};
    a.cache = rows[from].cache->head(layer, head);
    a.cache.cosines = tables_[rows[from].cache->rotary()].cosines.data();
    a.cache.sines = tables_[rows[from].cache->rotary()].sines.data();
    a.cache.key_bias = biased && block.key.bias != nullptr ? block.key.bias + static_cast<int64_t>(head) * size : nullptr;
    for (int32_t t = from; t < to; ++t)
      for (int32_t i = 0; i < share; ++i, ++a.rows) {
        memcpy(queries + static_cast<int64_t>(a.rows) * size,
               queries_.data() + t * query_width + static_cast<int64_t>(head * share + i) * size, sizeof(float) * size);
        last[a.rows] = rows[t].position;
        first[a.rows] = window > 0 ? std::max(0, rows[t].position - window + 1) : 0;
      }
    a.queries = queries;
    a.first = first;
    a.last = last;
    a.outputs = outputs;
    a.scratch = space;
    operations_->attend(a);
    int32_t row = 0;
    for (int32_t t = from; t < to; ++t)
      for (int32_t i = 0; i < share; ++i, ++row)
        memcpy(attended_.data() + t * query_width + static_cast<int64_t>(head * share + i) * size,
               outputs + static_cast<int64_t>(row) * size, sizeof(float) * size);
  });
}

void Decoder::forward(const std::vector<Row>& rows, std::vector<float>& hidden) {
  const int32_t tokens = static_cast<int32_t>(rows.size());
  const int64_t width = shape_.hidden, inner = shape_.intermediate;
  for (const Row& row : rows) extend_tables(row.cache->rotary(), row.position + 1);
  hidden.resize(tokens * width);
  branch_.resize(tokens * width);
  gate_.resize(tokens * inner);
  up_.resize(tokens * inner);
  pool_.each(tokens, [&](int64_t t) { embedding_.kind->decode(embedding_, rows[t].token, hidden.data() + t * width); });
  const auto join = [&] {
    pool_.each(tokens, [&](int64_t t) { operations_->add(hidden.data() + t * width, branch_.data() + t * width, width); });
  };
  const auto activate = operations_->gated_product[static_cast<int32_t>(shape_.activation)];
  for (int32_t layer = 0; layer < shape_.layers; ++layer) {
    const DecoderBlock& block = blocks_[layer];
    normalize(block.input_norm, hidden, tokens, normed_);
    attention(block, layer, rows);
    project(attended_.data(), {&block.output}, {branch_.data()}, tokens);
    join();
    normalize(block.output_norm, hidden, tokens, normed_);
    project(normed_.data(), {&block.gate, &block.up}, {gate_.data(), up_.data()}, tokens);
    pool_.each(tokens, [&](int64_t t) {
      activate(gate_.data() + t * inner, up_.data() + t * inner, shape_.intermediate);
    });
    project(gate_.data(), {&block.down}, {branch_.data()}, tokens);
    join();
  }
  normalize(final_norm_, hidden, tokens, normed_);
  hidden.swap(normed_);
  for (const Row& row : rows) row.cache->filled(row.position + 1);
}

void Decoder::logits(const float* hidden, int32_t rows, float* out) { project(hidden, {&head_}, {out}, rows); }

}  // namespace quern
