#include "engine/projection.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "kernels/kind.h"

namespace quern {
namespace {

bool same_inputs(const Linear& a, const Linear& b) {
  if (a.weight.kind->plain != b.weight.kind->plain) return false;
  if ((a.signs == nullptr) != (b.signs == nullptr) || a.fine != b.fine) return false;
  if (a.signs != nullptr && memcmp(a.signs, b.signs, (a.weight.columns + 7) / 8) != 0) return false;
  if (a.weight.kind->plain) return true;
  return a.input == b.input && activation_group(a.weight) == activation_group(b.weight);
}

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

}  // namespace

void check(const Linear& linear, int64_t bias_size, int64_t sign_bytes) {
  const Weight& w = linear.weight;
  const float scale = linear.input.given;
  require(linear.bias == nullptr || bias_size == w.rows, "a bias has one number a row");
  require(linear.signs == nullptr || sign_bytes == (static_cast<int64_t>(w.columns) + 7) / 8, "signs have one bit a column");
  require(scale == 0.0f || std::isnormal(scale), "a scale of inputs is a normal number");
  require(scale >= 0.0f, "a scale of inputs is above zero");
  require(!linear.fine || linear.input == InputScale{}, "fine inputs have the scales of their groups");
}

void Projector::project(const float* inputs, const std::vector<const Linear*>& linears, const std::vector<float*>& outputs,
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
    if (lead.weight.kind->plain) {
      activations_.tokens = tokens;
      activations_.columns = activations_.group = columns;
    } else {
      quantize(pool_, read, tokens, columns, activation_group(lead.weight), activations_, lead.input);
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
        operations_.add(outputs[i] + static_cast<int64_t>(t) * linears[i]->weight.rows, linears[i]->bias,
                         linears[i]->weight.rows);
}

// The products of activations_, and of what quantizing those left over, as if it were more tokens: the weights are read
// once. The sum is as exact as inputs of about 15 bits.
void Projector::multiply_fine(std::vector<Product>& products) {
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
    operations_.add(products[i].outputs, doubled[i].outputs + count, count);
  }
}

}  // namespace quern
