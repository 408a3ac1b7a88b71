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

// Rows that are too few for vectors of rows: lanes are positions, then dimensions of the head. A few blocks of keys are widened at
// a time, and one of values, so that they are in the L1 cache when all rows meet them; a few rows meet them together.
#if defined(__AVX512F__)
constexpr int32_t KEPT = 4, MOST_ROWS = 1;
#else
constexpr int32_t KEPT = 2, MOST_ROWS = 3;  // their product, in vectors of 16 lanes: what registers have room for
#endif

// scores (ROWS, STRETCH) of KEPT blocks of keys.
template <int32_t ROWS>
QUERN_INLINE void score_blocks(const float* queries, int32_t depth, const float* keys, float* scores) {
  Lanes total[ROWS][KEPT] = {};
  for (int32_t d = 0; d < depth; ++d)
#pragma GCC unroll 3
    for (int32_t r = 0; r < ROWS; ++r) {
      const Lanes query = spread(queries[r * depth + d]);
#pragma GCC unroll 4
      for (int32_t k = 0; k < KEPT; ++k) total[r][k] = fused(load(keys + (k * depth + d) * BLOCK), query, total[r][k]);
    }
#pragma GCC unroll 3
  for (int32_t r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int32_t k = 0; k < KEPT; ++k) store(scores + r * STRETCH + k * BLOCK, total[r][k]);
}

// outputs (ROWS, size) = outputs * corrections + scores . values of `count` positions, `CHUNK` of the dimensions from `from` on.
template <int32_t ROWS, int32_t CHUNK>
QUERN_INLINE void weigh(const float* scores, const float* values, int32_t count, int32_t size, int32_t from,
                        const float* corrections, float* outputs) {
  constexpr int32_t EACH = CHUNK / LANES;
  Lanes total[ROWS][EACH];
#pragma GCC unroll 3
  for (int32_t r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int32_t i = 0; i < EACH; ++i) total[r][i] = load(outputs + r * size + from + i * LANES) * corrections[r];
  for (int32_t p = 0; p < count; ++p)
#pragma GCC unroll 3
    for (int32_t r = 0; r < ROWS; ++r) {
      const Lanes weight = spread(scores[r * STRETCH + p]);
#pragma GCC unroll 4
      for (int32_t i = 0; i < EACH; ++i)
        total[r][i] = fused(load(values + p * size + from + i * LANES), weight, total[r][i]);
    }
#pragma GCC unroll 3
  for (int32_t r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int32_t i = 0; i < EACH; ++i) store(outputs + r * size + from + i * LANES, total[r][i]);
}

template <int32_t ROWS>
QUERN_INLINE void weigh_block(const float* scores, const float* values, int32_t count, int32_t size, const float* corrections,
                              float* outputs) {
  constexpr int32_t CHUNK = ROWS == 1 ? 64 : 32;
  int32_t d = 0;
  for (; d + CHUNK <= size; d += CHUNK) weigh<ROWS, CHUNK>(scores, values, count, size, d, corrections, outputs);
  for (; d + LANES <= size; d += LANES) weigh<ROWS, LANES>(scores, values, count, size, d, corrections, outputs);
  for (; d < size; ++d)
    for (int32_t r = 0; r < ROWS; ++r) {
      float value = outputs[r * size + d] * corrections[r];
      for (int32_t p = 0; p < count; ++p) value = fused(values[p * size + d], scores[r * STRETCH + p], value);
      outputs[r * size + d] = value;
    }
}

// One row's scores against a stretch to their exponentials, and its running maximum and sum; positions outside first ... last count
// nothing. Returns what outputs so far are to be multiplied by.
QUERN_INLINE float update_row(const Stretch& s, int32_t first, int32_t last, float* scores, float& maximum, float& sum_of) {
  for (int32_t p = 0; p < STRETCH; ++p)
    if (s.start + p < first || s.start + p > last) scores[p] = -INFINITY;
  Lanes top = load(scores);
#pragma GCC unroll 3
  for (int32_t b = 1; b < 4; ++b) top = choose(load(scores + b * BLOCK) > top, load(scores + b * BLOCK), top);
  const float found = largest(top), before = maximum;
  maximum = found > maximum ? found : maximum;
  const float correction = first_of(exponential(spread(before - maximum)));
  Lanes total{};
  for (int32_t b = 0; b < 4; ++b) {
    const Lanes e = exponential(load(scores + b * BLOCK) - maximum);
    store(scores + b * BLOCK, e);
    total += e;
  }
  sum_of = sum_of * correction + sum(total);
  return correction;
}

// How many of some rows are taken together.
QUERN_INLINE int32_t rows_of(int32_t rows) { return rows < MOST_ROWS ? rows : rows == MOST_ROWS + 1 && MOST_ROWS > 1 ? 2 : MOST_ROWS; }

void widen_block(const HeadCache& cache, const Stretch& s, int32_t block, float* keys);

// The codes of one block, of keys or values. Those of a head lie far from those of its next block, which no processor foresees.
QUERN_INLINE void fetch(const HeadCache& cache, const uint8_t* codes) {
  const int64_t bytes = static_cast<int64_t>(cache.precision) * cache.head_dim / 8 * BLOCK;
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(codes + i);
}

// Fewer than 16 rows from `begin` on. `widened`: the stretch holds keys and values already.
void attend_few(const Attend& a, const Stretch& s, int32_t begin, bool widened, float* scores, float* maxima, float* sums) {
  const int32_t blocks = (s.count + BLOCK - 1) / BLOCK, rows = a.rows - begin;
  const KeyValuePage* pages = a.cache.pages + s.start / BLOCK;
  const float* queries = a.queries + static_cast<int64_t>(begin) * s.depth;
  float* outputs = a.outputs + static_cast<int64_t>(begin) * s.size;
  for (int32_t b = 0; b < blocks; b += KEPT) {
    for (int32_t k = 0; !widened && k < KEPT && b + k < blocks; ++k) {
      fetch(a.cache, pages[b + k].values + a.cache.values_at);
      widen_block(a.cache, s, b + k, s.keys + k * s.depth * BLOCK);
    }
    const float* keys = widened ? s.keys + b * s.depth * BLOCK : s.keys;
    for (int32_t r = 0, count; r < rows; r += count) {
      count = rows_of(rows - r);
      const float* of = queries + r * s.depth;
      float* to = scores + r * STRETCH + b * BLOCK;
      if (count == 3) score_blocks<3 <= MOST_ROWS ? 3 : 1>(of, s.depth, keys, to);
      if (count == 2) score_blocks<2 <= MOST_ROWS ? 2 : 1>(of, s.depth, keys, to);
      if (count == 1) score_blocks<1>(of, s.depth, keys, to);
    }
  }
  float corrections[LANES];
  bool seen[LANES];
  for (int32_t r = 0; r < rows; ++r) {
    const int32_t first = a.first[begin + r], last = a.last[begin + r];
    seen[r] = last >= s.start && first < s.start + STRETCH;
    if (seen[r]) corrections[r] = update_row(s, first, last, scores + r * STRETCH, maxima[r], sums[r]);
  }
  for (int32_t b = 0; b < blocks; ++b) {
    const int32_t left = s.count - b * BLOCK, here = left < BLOCK ? left : BLOCK;
    if (!widened) {
      if (s.start + STRETCH + b * BLOCK <= a.last[begin]) fetch(a.cache, pages[STRETCH / BLOCK + b].keys + a.cache.keys_at);
      widen_values(a.cache, s.start / BLOCK + b, here, s.values);
    }
    const float* values = widened ? s.values + b * BLOCK * s.size : s.values;
    for (int32_t r = 0, count; r < rows; r += count) {
      count = rows_of(rows - r);
      for (int32_t i = 0; i < count; ++i)
        if (!seen[r + i]) count = 1;
      const float* of = scores + r * STRETCH + b * BLOCK;
      float* to = outputs + r * s.size;
      if (count == 3) weigh_block<3 <= MOST_ROWS ? 3 : 1>(of, values, here, s.size, corrections + r, to);
      if (count == 2) weigh_block<2 <= MOST_ROWS ? 2 : 1>(of, values, here, s.size, corrections + r, to);
      if (count == 1 && seen[r]) weigh_block<1>(of, values, here, s.size, corrections + r, to);
    }
    for (int32_t r = 0; r < rows; ++r) corrections[r] = 1.0f;
  }
}

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
