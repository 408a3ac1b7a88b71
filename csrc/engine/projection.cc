#include "engine/projection.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <stdexcept>

#include "kernels/kind.h"

namespace quern {
namespace {

bool same_signs(const Linear& a, const Linear& b) {
  return a.signs == b.signs ||
         (a.signs != nullptr && b.signs != nullptr && memcmp(a.signs, b.signs, (a.weight.columns + 7) / 8) == 0);
}

// Whether they want their inputs alike, but for the signs of a rotation.
bool same_treatment(const Linear& a, const Linear& b) {
  if (a.weight.kind->plain != b.weight.kind->plain || (a.signs == nullptr) != (b.signs == nullptr)) return false;
  if (a.weight.kind->plain) return true;
  return a.fine == b.fine && a.input == b.input && activation_group(a.weight) == activation_group(b.weight);
}

bool same_inputs(const Linear& a, const Linear& b) { return same_treatment(a, b) && same_signs(a, b); }
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
  const int32_t tokens = activations_.tokens;
  add_rests(activations_, both_);
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

// `activations` again, with twice as many tokens: what quantizing them left over comes behind them.
void Projector::add_rests(Activations& activations, std::vector<float>& both) {
  const int32_t tokens = activations.tokens, columns = activations.columns, group = activations.group;
  const int32_t groups = (columns + group - 1) / group;
  const int64_t size = static_cast<int64_t>(tokens) * columns;
  both.resize(2 * size);
  pool_.each(tokens, [&](int64_t t) {
    const float* x = activations.exact + t * columns;
    const int8_t* values = activations.values.data() + t * activations.stride;
    const float* scale = activations.scale.data() + t * groups;
    float* rest = both.data() + size + t * columns;
    memcpy(both.data() + t * columns, x, sizeof(float) * columns);
    for (int32_t g = 0; g < groups; ++g)
      for (int32_t c = g * group; c < std::min(columns, (g + 1) * group); ++c)
        rest[c] = x[c] - scale[g] * static_cast<float>(values[c]);
  });
  const bool for_few = !activations.halves.empty();
  quantize(pool_, both.data(), 2 * tokens, columns, group, activations, {}, for_few);
}

void Projector::visit(const std::vector<Visit>& visits) {
  std::vector<Product> products(visits.size());
  std::vector<bool> done(visits.size());
  size_t kinds = 0;
  for (size_t i = 0; i < visits.size(); ++i) {
    if (done[i]) continue;
    std::vector<size_t> places;
    std::vector<const Visit*> alike;
    for (size_t j = i; j < visits.size(); ++j)
      if (!done[j] && visits[j].inputs == visits[i].inputs && same_treatment(*visits[i].linear, *visits[j].linear)) {
        places.push_back(j);
        alike.push_back(&visits[j]);
        done[j] = true;
      }
    if (prepared_.size() == kinds) prepared_.emplace_back();
    std::vector<Product> made;
    prepare(alike, prepared_[kinds++], made);
    for (size_t k = 0; k < places.size(); ++k) products[places[k]] = made[k];
  }
  multiply(pool_, products);
  const bool rest = std::any_of(visits.begin(), visits.end(), [](const Visit& v) { return v.linear->fine || v.linear->bias; });
  if (rest) pool_.each(static_cast<int64_t>(visits.size()), [&](int64_t i) { finish(visits[i], products[i].outputs); });
}

// One of `products` for each visit. All have the same inputs and want the same of them, but for the signs of a rotation.
void Projector::prepare(const std::vector<const Visit*>& visits, Prepared& prepared, std::vector<Product>& products) {
  const Visit& lead = *visits[0];
  const Linear& linear = *lead.linear;
  const int32_t columns = linear.weight.columns;
  const bool plain = linear.weight.kind->plain, rotated = linear.signs != nullptr, fine = linear.fine;
  std::vector<int32_t> firsts, read;  // of each visit its first row among those that are read; these
  std::vector<const uint8_t*> signs;
  for (size_t i = 0; i < visits.size(); ++i) {
    const Visit& v = *visits[i];
    if (i > 0 && v.rows == visits[i - 1]->rows && v.count == visits[i - 1]->count && same_signs(*v.linear, *visits[i - 1]->linear)) {
      firsts.push_back(firsts.back());
      continue;
    }
    firsts.push_back(static_cast<int32_t>(read.size()));
    read.insert(read.end(), v.rows, v.rows + v.count);
    signs.insert(signs.end(), v.count, v.linear->signs);
  }
  int32_t tokens = lead.tokens;
  const float* inputs = lead.inputs;
  if (rotated || plain) {
    tokens = static_cast<int32_t>(read.size());
    prepared.rows.resize(static_cast<size_t>(tokens) * columns);
    pool_.each(tokens, [&](int64_t t) {
      float* row = prepared.rows.data() + t * columns;
      memcpy(row, lead.inputs + static_cast<int64_t>(read[t]) * columns, sizeof(float) * columns);
      if (rotated) rotate_row(row, columns, signs[t]);
    });
    inputs = prepared.rows.data();
    std::iota(read.begin(), read.end(), 0);
  }
  Activations& all = prepared.all;
  if (plain) {
    all.tokens = tokens;
    all.columns = all.group = columns;
    all.exact = inputs;
  } else {
    quantize(pool_, inputs, tokens, columns, activation_group(linear.weight), all, linear.input, true);
    if (fine) add_rests(all, prepared.both);
  }
  std::vector<int32_t> gathered;
  int64_t sums = 0;
  for (size_t i = 0; i < visits.size(); ++i) {
    const Visit& v = *visits[i];
    const int32_t* rows = read.data() + firsts[i];
    const int32_t count = fine ? 2 * v.count : v.count;
    if (fine) sums += static_cast<int64_t>(count) * v.linear->weight.rows;
    const bool follow = v.count == 0 || rows[v.count - 1] - rows[0] == v.count - 1;  // rows rise
    if (follow && (!fine || tokens == 1)) {
      products.push_back({&v.linear->weight, v.outputs, {&all, v.count == 0 ? 0 : rows[0], count}});
      continue;
    }
    if (i > 0 && firsts[i] == firsts[i - 1]) {
      products.push_back({&v.linear->weight, v.outputs, products.back().inputs});
      continue;
    }
    products.push_back({&v.linear->weight, v.outputs, {&prepared.some, static_cast<int32_t>(gathered.size()), count}});
    gathered.insert(gathered.end(), rows, rows + v.count);
    if (fine)
      for (int32_t r = 0; r < v.count; ++r) gathered.push_back(tokens + rows[r]);
  }
  if (!gathered.empty()) gather(pool_, all, gathered, prepared.some);
  if (!fine) return;
  prepared.sums.resize(sums);
  float* to = prepared.sums.data();
  for (Product& product : products) {
    product.outputs = to;
    to += static_cast<int64_t>(product.inputs.tokens) * product.weight->rows;
  }
}

void Projector::finish(const Visit& visit, const float* sums) {
  const int64_t rows = visit.linear->weight.rows, count = visit.count * rows;
  if (visit.linear->fine) {
    memcpy(visit.outputs, sums, sizeof(float) * count);
    operations_.add(visit.outputs, sums + count, count);
  }
  if (visit.linear->bias != nullptr)
    for (int32_t t = 0; t < visit.count; ++t) operations_.add(visit.outputs + t * rows, visit.linear->bias, rows);
}

}  // namespace quern
