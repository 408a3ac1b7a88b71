// Attention as a step: pieces of the work for threads, and gathering the rows of each.
#include <algorithm>
#include <cstring>

#include "engine/steps.h"

namespace quern {
namespace {

constexpr int32_t QUERY_ROWS = 32;  // tokens whose queries attention takes through a stretch of keys together

}  // namespace

void AttendStep::run(const Batch& batch) const {
  const CacheLayer& kept = batch.shape.layers[layer];
  // Pieces: up to QUERY_ROWS tokens of one sequence, and one key/value head with the query heads that share it.
  std::vector<int32_t> starts;
  for (int32_t t = 0; t < batch.tokens(); ++t)
    if (t == 0 || batch.rows[t].cache != batch.rows[t - 1].cache || t - starts.back() == QUERY_ROWS) starts.push_back(t);
  starts.push_back(batch.tokens());
  const int32_t share = batch.shape.widths[queries] / (kept.heads * kept.head_dim), most = QUERY_ROWS * share;
  const int32_t deepest = key_bias != nullptr ? 2 * kept.head_dim : kept.head_dim;
  const int64_t stretch =
      attend_scratch(most, kept.head_dim, deepest) + static_cast<int64_t>(most) * (deepest + kept.head_dim) + 2 * most;
  const int64_t pieces = static_cast<int64_t>(starts.size() - 1) * kept.heads;
  batch.scratch.resize(pieces * stretch);
  batch.pool.each(pieces, [&](int64_t p) {
    const int64_t at = p / kept.heads;
    piece(batch, static_cast<int32_t>(p % kept.heads), starts[at], starts[at + 1], batch.scratch.data() + p * stretch);
  });
}

void AttendStep::prepare(const SequenceCache& cache, const float* query, int32_t depth, const float* bias, float* to) const {
  const int32_t size = cache.shape().layers[layer].head_dim, half = size / 2;
  memcpy(to, query, sizeof(float) * size);
  if (depth > size)
    for (int32_t d = 0; d < half; ++d) {
      const float x = query[d], y = query[d + half], a = bias[d], b = bias[d + half];
      to[size + d] = x * a + y * b;          // of the position's cosine
      to[size + half + d] = y * a - x * b;   // and of its sine
    }
  cache.transform(layer, to, 1);
}

void AttendStep::piece(const Batch& batch, int32_t head, int32_t from, int32_t end, float* space) const {
  const CacheLayer& kept = batch.shape.layers[layer];
  const int32_t size = kept.head_dim, share = batch.shape.widths[queries] / (kept.heads * size), most = QUERY_ROWS * share;
  const SequenceCache& cache = *batch.rows[from].cache;
  const int32_t depth = cache.depth(layer, key_bias != nullptr);
  const float* bias = key_bias == nullptr ? nullptr : key_bias + static_cast<int64_t>(head) * size;
  float* gathered = space + attend_scratch(most, size, depth);
  float* outputs = gathered + static_cast<int64_t>(most) * depth;
  int32_t* last = reinterpret_cast<int32_t*>(outputs + static_cast<int64_t>(most) * size);
  int32_t* first = last + most;
  Attend a{};
  a.cache = cache.head(layer, head);
  a.cache.depth = depth;
  a.cache.cosines = batch.rotaries[rotary].table(cache.rotary()).cosines.data();
  a.cache.sines = batch.rotaries[rotary].table(cache.rotary()).sines.data();
  const int64_t of_head = static_cast<int64_t>(head) * share * size;
  for (int32_t t = from; t < end; ++t)
    for (int32_t i = 0; i < share; ++i, ++a.rows) {
      const int32_t position = batch.rows[t].position;
      prepare(cache, batch.row(queries, t) + of_head + static_cast<int64_t>(i) * size, depth, bias,
              gathered + static_cast<int64_t>(a.rows) * depth);
      last[a.rows] = position;
      first[a.rows] = window > 0 ? std::max(0, position - window + 1) : 0;
    }
  a.queries = gathered;
  a.first = first;
  a.last = last;
  a.outputs = outputs;
  a.scratch = space;
  batch.operations.attend(a);
  cache.transform(layer, outputs, a.rows);
  for (int32_t t = from; t < end; ++t)  // a token's heads lie together
    memcpy(batch.row(to, t) + of_head, outputs + static_cast<int64_t>(t - from) * share * size, sizeof(float) * share * size);
}

}  // namespace quern
