#include "engine/sampling.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace quern {
namespace {

bool broken(const float* logits, int32_t count) {
  for (int32_t i = 0; i < count; ++i)
    if (!(logits[i] < INFINITY)) return true;
  return false;
}

}  // namespace

int32_t likeliest(const float* logits, int32_t count) {
  if (broken(logits, count)) return -1;
  return static_cast<int32_t>(std::max_element(logits, logits + count) - logits);
}

int32_t sample(const float* logits, int32_t count, double temperature, int32_t top_k, double top_p, double place) {
  if (broken(logits, count)) return -1;
  const float top = *std::max_element(logits, logits + count);
  const auto weight = [&](int32_t token) {
    return std::exp((static_cast<double>(logits[token]) - static_cast<double>(top)) / temperature);
  };
  const auto before = [&](int32_t a, int32_t b) { return logits[a] > logits[b] || (logits[a] == logits[b] && a < b); };
  std::vector<int32_t> order(count);
  for (int32_t i = 0; i < count; ++i) order[i] = i;
  const int32_t kept = top_k > 0 ? std::min(top_k, count) : count;
  double total = 0.0;
  if (kept < count) {
    std::nth_element(order.begin(), order.begin() + kept - 1, order.end(), before);
    order.resize(kept);
  }
  // Sorted piece by piece: nearly always the first few hundred tokens hold the place that is looked for.
  for (int32_t token : order) total += weight(token);
  size_t sorted = 0;
  const auto sort_to = [&](size_t index) {
    while (sorted <= index) {
      const size_t stop = std::min(order.size(), std::max<size_t>(256, 4 * sorted));
      std::partial_sort(order.begin() + sorted, order.begin() + stop, order.end(), before);
      sorted = stop;
    }
  };
  size_t last = order.size();
  double reached = total;
  if (top_p < 1.0) {
    reached = 0.0;
    for (last = 0; last < order.size() && !(reached >= top_p * total);) {
      sort_to(last);
      reached += weight(order[last++]);
    }
  }
  double passed = 0.0;
  for (size_t i = 0; i < last; ++i) {
    sort_to(i);
    passed += weight(order[i]);
    if (passed > place * reached) return order[i];
  }
  return order[last - 1];
}

}  // namespace quern
