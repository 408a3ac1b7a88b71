#include "engine/routing.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

namespace quern {
namespace {

constexpr int64_t SERIAL = 1 << 14;  // numbers for which waking threads costs more than it gains

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

int32_t width_of(const DecoderShape& shape, int32_t buffer) {
  require(buffer >= 0 && buffer < static_cast<int32_t>(shape.widths.size()), "a routed step names a buffer that there is not");
  return shape.widths[buffer];
}

void check_mlp(const GatedMlp& mlp, int64_t width, int64_t inner) {
  for (const Linear* wide : {&mlp.gate, &mlp.up})
    require(wide->weight.columns == width && wide->weight.rows == inner, "an expert has a shape that the config denies");
  require(mlp.down.weight.columns == inner && mlp.down.weight.rows == width, "an expert has a shape that the config denies");
}

template <typename Function>
void each(ThreadPool& pool, int64_t rows, int64_t width, Function&& function) {
  if (rows * width > SERIAL) return pool.each(rows, function);
  for (int64_t row = 0; row < rows; ++row) function(row);
}

// The tokens of a batch by expert: those of expert e are rows [starts[e], starts[e + 1]).
struct Sorted {
  std::vector<int32_t> starts, tokens;
  std::vector<int32_t> places;  // (tokens, per_token): the row of each of a token's experts

  Sorted(const std::vector<int32_t>& chosen, int32_t per_token, size_t experts)
      : starts(experts + 1), tokens(chosen.size()), places(chosen.size()) {
    for (const int32_t expert : chosen) ++starts[expert + 1];
    std::partial_sum(starts.begin(), starts.end(), starts.begin());
    std::vector<int32_t> next(starts.begin(), starts.end() - 1);
    for (size_t i = 0; i < chosen.size(); ++i) {
      places[i] = next[chosen[i]]++;
      tokens[places[i]] = static_cast<int32_t>(i) / per_token;
    }
  }
};

}  // namespace

void choose_experts(const Operations& operations, const Router& router, float* scores, int32_t experts, int32_t* chosen,
                    float* weights) {
  const int32_t count = router.per_token;
  for (int32_t k = 0; k < count; ++k) {  // a NaN is greater than nothing, but something is always chosen
    int32_t best = -1;
    for (int32_t e = 0; e < experts; ++e)
      if (std::find(chosen, chosen + k, e) == chosen + k && (best < 0 || scores[e] > scores[best])) best = e;
    chosen[k] = best;
  }
  const float greatest = scores[chosen[0]];
  std::sort(chosen, chosen + count);
  float total = operations.exponentials(scores, greatest, experts);
  if (router.renormalize) {
    total = 0.0f;
    for (int32_t k = 0; k < count; ++k) total += scores[chosen[k]];
  }
  for (int32_t k = 0; k < count; ++k) weights[k] = scores[chosen[k]] / total;
}

void Routed::check(const DecoderShape& shape) const {
  const int64_t width = width_of(shape, places.from), count = static_cast<int64_t>(experts.size());
  require(router.per_token > 0 && router.per_token <= count, "a token meets at least one expert, and not more than there are");
  require(width_of(shape, places.scores) == count, "a router has one score for each expert");
  require(width_of(shape, places.to) == width, "experts make what is as wide as what they read");
  require(width_of(shape, places.made) == router.per_token * width, "there is room for what each of a token's experts makes");
  const int64_t inner = experts[0].gate.weight.rows;
  require(width_of(shape, places.gate) == router.per_token * inner && width_of(shape, places.up) == router.per_token * inner,
          "there is room for the gates of a token's experts");
  for (const GatedMlp& expert : experts) check_mlp(expert, width, inner);
  require(shared.has_value() == shared_places.has_value(), "a shared expert has buffers of its own");
  if (!shared) return;
  const int64_t wide = width_of(shape, shared_places->gate);
  require(width_of(shape, shared_places->score) == 1, "a shared expert has one score");
  require(width_of(shape, shared_places->up) == wide && width_of(shape, shared_places->made) == width,
          "there is room for the gate of a shared expert");
  check_mlp(*shared, width, wide);
}

void Routed::run(const Batch& batch) const {
  const int32_t tokens = batch.tokens(), count = static_cast<int32_t>(experts.size()), each_token = router.per_token;
  const int32_t width = batch.shape.widths[places.from], inner = experts[0].gate.weight.rows;
  std::vector<int32_t> chosen(static_cast<size_t>(tokens) * each_token);
  std::vector<float> weights(chosen.size());
  each(batch.pool, tokens, static_cast<int64_t>(count) * each_token, [&](int64_t t) {
    choose_experts(batch.operations, router, batch.row(places.scores, t), count, &chosen[t * each_token], &weights[t * each_token]);
  });
  const Sorted sorted(chosen, each_token, experts.size());
  const int32_t rows = static_cast<int32_t>(chosen.size());
  std::vector<int32_t> order(std::max(rows, tokens));
  std::iota(order.begin(), order.end(), 0);
  float* gate = batch.row(places.gate, 0);
  float* up = batch.row(places.up, 0);
  float* made = batch.row(places.made, 0);
  const float* from = batch.row(places.from, 0);
  std::vector<Visit> wide, narrow;
  for (int32_t e = 0; e < count; ++e) {
    const int64_t first = sorted.starts[e];
    const int32_t met = sorted.starts[e + 1] - sorted.starts[e];
    if (met == 0) continue;
    wide.push_back({&experts[e].gate, from, tokens, &sorted.tokens[first], met, gate + first * inner});
    wide.push_back({&experts[e].up, from, tokens, &sorted.tokens[first], met, up + first * inner});
    narrow.push_back({&experts[e].down, gate, rows, &order[first], met, made + first * width});
  }
  if (shared) {
    float* shared_gate = batch.row(shared_places->gate, 0);
    wide.push_back({&shared->gate, from, tokens, order.data(), tokens, shared_gate});
    wide.push_back({&shared->up, from, tokens, order.data(), tokens, batch.row(shared_places->up, 0)});
    narrow.push_back({&shared->down, shared_gate, tokens, order.data(), tokens, batch.row(shared_places->made, 0)});
  }
  batch.projector.visit(wide);
  const auto gated = batch.operations.gated_product[static_cast<int32_t>(activation)];
  each(batch.pool, rows, inner, [&](int64_t r) { gated(gate + r * inner, up + r * inner, inner); });
  if (shared) {
    const int32_t of_shared = batch.shape.widths[shared_places->gate];
    each(batch.pool, tokens, of_shared,
         [&](int64_t t) { gated(batch.row(shared_places->gate, t), batch.row(shared_places->up, t), of_shared); });
  }
  batch.projector.visit(narrow);
  each(batch.pool, tokens, static_cast<int64_t>(each_token) * width, [&](int64_t t) {
    float* to = batch.row(places.to, t);
    std::fill_n(to, width, 0.0f);
    for (int64_t k = t * each_token; k < (t + 1) * each_token; ++k)
      batch.operations.add_scaled(to, made + static_cast<int64_t>(sorted.places[k]) * width, weights[k], width);
    if (!shared) return;
    float below = -*batch.row(shared_places->score, t);
    batch.operations.exponentials(&below, 0.0f, 1);
    batch.operations.add_scaled(to, batch.row(shared_places->made, t), 1.0f / (1.0f + below), width);
  });
}

}  // namespace quern
