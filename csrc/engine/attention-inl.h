// Attention for `Operations`: included by operations-inl.h, inside its namespaces, after its vector helpers.
//
// Softmax goes through the positions in stretches of 64. Single rows, as in decoding, compute with positions side by side;
// from eight rows on, as in prefill, 16 rows lie side by side and nothing is added across lanes. Both add in the same order.

// int4 keys of one block as float32 (head_dim, BLOCK).
QUERN_INLINE void widen_nibble_keys(const HeadCache& cache, const uint8_t* codes, float* keys) {
  const int32_t size = cache.head_dim;
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(codes + size / 2 * BLOCK);
  for (int32_t from = 0; from < size; from += CODE_GROUP, scales += BLOCK) {
    const int32_t half = (size - from < CODE_GROUP ? size - from : CODE_GROUP) / 2;
    const Lanes scale = half_lanes(scales);
    for (int32_t d = from; d < from + half; ++d, codes += BLOCK) {
      Lanes low, high;
      nibble_lanes(codes, low, high);
      store(keys + d * BLOCK, low * scale);
      store(keys + (d + half) * BLOCK, high * scale);
    }
  }
}

// Keys of one block as float32 (head_dim, BLOCK).
void widen_keys(const HeadCache& cache, int64_t block, float* keys) {
  const int32_t size = cache.head_dim;
  const uint8_t* codes = cache.pages[block].keys + cache.keys_at;
  if (cache.precision == CachePrecision::float32) {
    memcpy(keys, codes, sizeof(float) * size * BLOCK);
    return;
  }
  if (cache.precision == CachePrecision::float16) {
    const uint16_t* stored = reinterpret_cast<const uint16_t*>(codes);
    for (int32_t d = 0; d < size; ++d) store(keys + d * BLOCK, half_lanes(stored + d * BLOCK));
    return;
  }
  if (cache.precision == CachePrecision::int4) {
    widen_nibble_keys(cache, codes, keys);
    return;
  }
  const int8_t* stored = reinterpret_cast<const int8_t*>(codes);
  const Lanes scale = load(reinterpret_cast<const float*>(codes + size * BLOCK));
  for (int32_t d = 0; d < size; ++d) store(keys + d * BLOCK, byte_lanes(stored + d * BLOCK) * scale);
}

// int4 values of one position as float32 (head_dim,).
QUERN_INLINE void widen_nibble_values(const uint8_t* codes, const uint16_t* scales, int32_t size, float* values) {
  for (int32_t from = 0; from < size; from += CODE_GROUP, ++scales) {
    const int32_t half = (size - from < CODE_GROUP ? size - from : CODE_GROUP) / 2;
    const float scale = half_value(*scales);
    if (half == LANES) {
      Lanes low, high;
      nibble_lanes(codes, low, high);
      store(values, low * scale);
      store(values + LANES, high * scale);
    } else {
      for (int32_t j = 0; j < half; ++j) {
        values[j] = static_cast<float>((codes[j] & 15) - 8) * scale;
        values[j + half] = static_cast<float>((codes[j] >> 4) - 8) * scale;
      }
    }
    codes += half;
    values += 2 * half;
  }
}

// Values of up to BLOCK positions, the first ones of a block, as float32 (count, head_dim).
QUERN_INLINE void widen_values(const HeadCache& cache, int64_t block, int32_t count, float* values) {
  const int32_t size = cache.head_dim;
  const uint8_t* codes = cache.pages[block].values + cache.values_at;
  if (cache.precision == CachePrecision::float32) {
    memcpy(values, codes, sizeof(float) * count * size);
    return;
  }
  if (cache.precision == CachePrecision::int4) {
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(codes + size / 2 * BLOCK);
    for (int32_t p = 0; p < count; ++p)
      widen_nibble_values(codes + p * (size / 2), scales + p * code_groups(size), size, values + p * size);
    return;
  }
  for (int32_t p = 0; p < count; ++p, values += size) {
    if (cache.precision == CachePrecision::float16) {
      const uint16_t* stored = reinterpret_cast<const uint16_t*>(codes) + p * size;
      int32_t d = 0;
      for (; d + LANES <= size; d += LANES) store(values + d, half_lanes(stored + d));
      for (; d < size; ++d) values[d] = half_value(stored[d]);
    } else {
      const int8_t* stored = reinterpret_cast<const int8_t*>(codes) + p * size;
      const float scale = reinterpret_cast<const float*>(codes + size * BLOCK)[p];
      int32_t d = 0;
      for (; d + LANES <= size; d += LANES) store(values + d, byte_lanes(stored + d) * scale);
      for (; d < size; ++d) values[d] = static_cast<float>(stored[d]) * scale;
    }
  }
}

constexpr int32_t STRETCH = 4 * BLOCK;  // positions between two updates of the running softmax
constexpr int32_t FEWEST = LANES / 2;   // rows for which it pays to fill a vector with rows

// Keys and values of a stretch in float32: (4, depth, BLOCK) and (STRETCH, head_dim). Zero past `count` positions. Where the
// depth is twice the size, cosines and sines of the positions stand below the keys.
struct Stretch {
  int64_t start;
  int32_t count, size, depth;
  float* keys;
  float* values;
};

#include "engine/attention-few-inl.h"

// Scores of N times 16 rows against the positions [from, from + SIDE) of a stretch: (N, STRETCH, LANES), of which SIDE are
// written.
template <int32_t N>
QUERN_INLINE void score_side(const float* queries, const Stretch& s, int32_t from, float* scores) {
  const float* keys = s.keys + static_cast<int64_t>(from / BLOCK) * s.depth * BLOCK + from % BLOCK;
  Lanes total[N][SIDE] = {};
  for (int32_t d = 0; d < s.depth; ++d) {
    Lanes query[N];
    for (int32_t n = 0; n < N; ++n) query[n] = load(queries + (n * s.depth + d) * LANES);
    for (int32_t i = 0; i < SIDE; ++i)
      for (int32_t n = 0; n < N; ++n) total[n][i] = fused(spread(keys[d * BLOCK + i]), query[n], total[n][i]);
  }
  for (int32_t n = 0; n < N; ++n)
    for (int32_t i = 0; i < SIDE; ++i) store(scores + (n * STRETCH + from + i) * LANES, total[n][i]);
}

// outputs (N, head_dim, LANES) += values . scores, COUNT dimensions from `from` on.
template <int32_t N, int32_t COUNT>
QUERN_INLINE void weigh_side(const float* scores, const Stretch& s, int32_t from, const Lanes* correction, float* outputs) {
  Lanes total[N][COUNT];
  for (int32_t n = 0; n < N; ++n)
    for (int32_t i = 0; i < COUNT; ++i) total[n][i] = load(outputs + (n * s.size + from + i) * LANES) * correction[n];
  for (int32_t p = 0; p < s.count; ++p) {
    Lanes weight[N];
    for (int32_t n = 0; n < N; ++n) weight[n] = load(scores + (n * STRETCH + p) * LANES);
    for (int32_t i = 0; i < COUNT; ++i)
      for (int32_t n = 0; n < N; ++n) total[n][i] = fused(spread(s.values[p * s.size + from + i]), weight[n], total[n][i]);
  }
  for (int32_t n = 0; n < N; ++n)
    for (int32_t i = 0; i < COUNT; ++i) store(outputs + (n * s.size + from + i) * LANES, total[n][i]);
}

// Scores of 16 rows to their exponentials; the running maxima and sums of the rows. Returns what outputs so far are to be
// multiplied by.
QUERN_INLINE Lanes update_softmax(const Stretch& s, const int32_t* firsts, const int32_t* lasts, float* scores,
                                  float* maxima, float* sums) {
  const Whole first = load_whole(firsts), last = load_whole(lasts);
  const int32_t start = static_cast<int32_t>(s.start);
  const Whole active = (last >= start) & (first < start + STRETCH);
  const Lanes before = load(maxima), nothing = spread(-INFINITY);
  Lanes top = before;
  for (int32_t p = 0; p < STRETCH; ++p) {
    const Whole seen = (first <= start + p) & (last >= start + p);
    const Lanes found = choose(seen, load(scores + p * LANES), nothing);
    top = choose(found > top, found, top);
    store(scores + p * LANES, found);
  }
  const Lanes correction = choose(active, exponential(before - top), spread(1.0f));
  for (int32_t p = 0; p < STRETCH; ++p)
    store(scores + p * LANES, choose(active, exponential(load(scores + p * LANES) - top), Lanes{}));
  Lanes part[BLOCK];
  for (int32_t p = 0; p < BLOCK; ++p) {
    part[p] = load(scores + p * LANES);
    for (int32_t b = 1; b < 4; ++b) part[p] += load(scores + (b * BLOCK + p) * LANES);
  }
  for (int32_t width = BLOCK / 2; width > 0; width /= 2)
    for (int32_t p = 0; p < width; ++p) part[p] += part[p + width];
  store(sums, load(sums) * correction + part[0]);
  store(maxima, top);
  return correction;
}

// N times 16 rows; lanes are rows, so nothing is added across lanes. The order of additions is that of attend_few.
template <int32_t N>
QUERN_INLINE void attend_sixteens(const Stretch& s, const float* queries, const int32_t* firsts, const int32_t* lasts,
                                  float* scores, float* maxima, float* sums, float* outputs) {
  bool any = false;
  for (int32_t i = 0; i < N * LANES; ++i) any |= lasts[i] >= s.start && firsts[i] < s.start + STRETCH;
  if (!any) return;
  for (int32_t p = 0; p < STRETCH; p += SIDE) score_side<N>(queries, s, p, scores);
  Lanes correction[N];
  for (int32_t n = 0; n < N; ++n)
    correction[n] = update_softmax(s, firsts + n * LANES, lasts + n * LANES, scores + n * STRETCH * LANES,
                                   maxima + n * LANES, sums + n * LANES);
  int32_t d = 0;
  for (; d + SIDE <= s.size; d += SIDE) weigh_side<N, SIDE>(scores, s, d, correction, outputs);
  for (; d < s.size; ++d) weigh_side<N, 1>(scores, s, d, correction, outputs);
}

// Keys of one block of a stretch and what stands below them: (depth, BLOCK).
void widen_block(const HeadCache& cache, const Stretch& s, int32_t block, float* keys) {
  const int64_t at = s.start / BLOCK + block;
  const int32_t angles = s.size / 2 * BLOCK;
  widen_keys(cache, at, keys);
  if (s.depth == s.size) return;
  memcpy(keys + s.size * BLOCK, cache.cosines + at * angles, sizeof(float) * angles);
  memcpy(keys + s.size * BLOCK + angles, cache.sines + at * angles, sizeof(float) * angles);
}

QUERN_INLINE void widen(const HeadCache& cache, const Stretch& s) {
  const int32_t blocks = (s.count + BLOCK - 1) / BLOCK;
  for (int32_t b = 0; b < blocks; ++b) {
    const int32_t left = s.count - b * BLOCK;
    widen_block(cache, s, b, s.keys + b * s.depth * BLOCK);
    widen_values(cache, s.start / BLOCK + b, left < BLOCK ? left : BLOCK, s.values + b * BLOCK * s.size);
  }
  memset(s.keys + blocks * s.depth * BLOCK, 0, sizeof(float) * (4 - blocks) * s.depth * BLOCK);
}

void attend(const Attend& a) {
  const int32_t size = a.cache.head_dim, depth = a.cache.depth, room = (a.rows + LANES - 1) / LANES * LANES;
  const int32_t together = a.rows % LANES < FEWEST ? a.rows / LANES * LANES : room;
  Stretch s{0, 0, size, depth, a.scratch, a.scratch + STRETCH * (depth + BLOCK)};
  float* scores = s.values + STRETCH * (size + BLOCK);
  float* maxima = scores + ABREAST * STRETCH * LANES;
  float* sums = maxima + room;
  int32_t* firsts = reinterpret_cast<int32_t*>(sums + room);
  int32_t* lasts = firsts + room;
  float* queries = reinterpret_cast<float*>(lasts + room);  // of the rows that are done together: (16s, depth, LANES)
  float* outputs = queries + static_cast<int64_t>(together) * depth;  // (16s, size, LANES)
  int32_t first = a.first[0], last = a.last[0];
  memset(a.outputs, 0, sizeof(float) * a.rows * size);
  memset(queries, 0, sizeof(float) * together * (depth + size));
  for (int32_t r = 0; r < room; ++r) {
    const bool real = r < a.rows;  // the others see nothing
    maxima[r] = real ? -INFINITY : 0.0f;
    sums[r] = 0.0f;
    firsts[r] = real ? a.first[r] : 0;
    lasts[r] = real ? a.last[r] : -1;
    if (!real) continue;
    first = firsts[r] < first ? firsts[r] : first;
    last = lasts[r] > last ? lasts[r] : last;
    if (r >= together) continue;
    float* lane = queries + static_cast<int64_t>(r / LANES) * depth * LANES + r % LANES;
    for (int32_t d = 0; d < depth; ++d) lane[d * LANES] = a.queries[static_cast<int64_t>(r) * depth + d];
  }
  for (s.start = first / STRETCH * STRETCH; s.start <= last; s.start += STRETCH) {
    s.count = last - s.start + 1 < STRETCH ? static_cast<int32_t>(last - s.start + 1) : STRETCH;
    if (together > 0) widen(a.cache, s);
    int32_t r = 0;
    for (; r + ABREAST * LANES <= together; r += ABREAST * LANES)
      attend_sixteens<ABREAST>(s, queries + static_cast<int64_t>(r) * depth, firsts + r, lasts + r, scores, maxima + r,
                               sums + r, outputs + static_cast<int64_t>(r) * size);
    for (; r < together; r += LANES)
      attend_sixteens<1>(s, queries + static_cast<int64_t>(r) * depth, firsts + r, lasts + r, scores, maxima + r, sums + r,
                         outputs + static_cast<int64_t>(r) * size);
    if (r < a.rows) attend_few(a, s, r, together > 0, scores, maxima + r, sums + r);
  }
  for (int32_t r = 0; r < a.rows; ++r)
    for (int32_t d = 0; d < size; ++d) {
      const int64_t at = static_cast<int64_t>(r) * size + d;
      const int64_t from = (static_cast<int64_t>(r / LANES) * size + d) * LANES + r % LANES;
      a.outputs[at] = (r < together ? outputs[from] : a.outputs[at]) / sums[r];
    }
}
