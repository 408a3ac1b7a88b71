// Attention of fewer than 16 rows, as in decoding: included by attention-inl.h, in the middle of it.

// Rows that are too few for vectors of rows: lanes are positions, then dimensions of the head. A few blocks of keys are widened at
// a time, and one of values, so that they are in the L1 cache when all rows meet them; a few rows meet them together.
#if defined(__AVX512F__)
constexpr int32_t KEPT = 4, MOST_ROWS = 1;
#else
constexpr int32_t KEPT = 2, MOST_ROWS = 3;  // their product, in vectors of 16 lanes: what registers have room for
#endif

// Keys and values of some blocks as they are met: widened before, or int8 ones widened by each meeting, which is less work for as
// few rows as meet them together.
struct FloatKeys {
  const float* keys;
  int32_t depth;
  __attribute__((always_inline)) inline Lanes at(int32_t k, int32_t d) const { return load(keys + (k * depth + d) * BLOCK); }
};

struct ByteKeys {
  const int8_t* codes[KEPT];
  Lanes scales[KEPT];
  const uint8_t* ahead[KEPT];  // what is fetched meanwhile, evenly: few lines can be on their way at a time
  __attribute__((always_inline)) inline Lanes at(int32_t k, int32_t d) const {
    __builtin_prefetch(ahead[k] + d * BLOCK);
    return byte_lanes(codes[k] + d * BLOCK) * scales[k];
  }
};

struct FloatValues {
  const float* values;
  int32_t size;
  __attribute__((always_inline)) inline Lanes at(int32_t p, int32_t d) const { return load(values + p * size + d); }
  __attribute__((always_inline)) inline float one(int32_t p, int32_t d) const { return values[p * size + d]; }
};

struct ByteValues {
  const int8_t* codes;
  const float* scales;
  int32_t size;
  const uint8_t* ahead;
  __attribute__((always_inline)) inline Lanes at(int32_t p, int32_t d) const {
    __builtin_prefetch(ahead + p * size + d);
    return byte_lanes(codes + p * size + d) * scales[p];
  }
  __attribute__((always_inline)) inline float one(int32_t p, int32_t d) const { return static_cast<float>(codes[p * size + d]) * scales[p]; }
};

// scores (ROWS, STRETCH) of KEPT blocks of keys.
template <int32_t ROWS, typename Keys>
QUERN_INLINE void score_blocks(const float* queries, int32_t depth, const Keys& keys, float* scores) {
  Lanes total[ROWS][KEPT] = {};
  for (int32_t d = 0; d < depth; ++d)
#pragma GCC unroll 4
    for (int32_t k = 0; k < KEPT; ++k) {
      const Lanes key = keys.at(k, d);
#pragma GCC unroll 3
      for (int32_t r = 0; r < ROWS; ++r) total[r][k] = fused(key, spread(queries[r * depth + d]), total[r][k]);
    }
#pragma GCC unroll 3
  for (int32_t r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int32_t k = 0; k < KEPT; ++k) store(scores + r * STRETCH + k * BLOCK, total[r][k]);
}

// outputs (ROWS, size) = outputs * corrections + scores . values of `count` positions, `CHUNK` of the dimensions from `from` on.
template <int32_t ROWS, int32_t CHUNK, typename Values>
QUERN_INLINE void weigh(const float* scores, const Values& values, int32_t count, int32_t size, int32_t from,
                        const float* corrections, float* outputs) {
  constexpr int32_t EACH = CHUNK / LANES;
  Lanes total[ROWS][EACH];
#pragma GCC unroll 3
  for (int32_t r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int32_t i = 0; i < EACH; ++i) total[r][i] = load(outputs + r * size + from + i * LANES) * corrections[r];
  for (int32_t p = 0; p < count; ++p)
#pragma GCC unroll 4
    for (int32_t i = 0; i < EACH; ++i) {
      const Lanes value = values.at(p, from + i * LANES);
#pragma GCC unroll 3
      for (int32_t r = 0; r < ROWS; ++r) total[r][i] = fused(value, spread(scores[r * STRETCH + p]), total[r][i]);
    }
#pragma GCC unroll 3
  for (int32_t r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int32_t i = 0; i < EACH; ++i) store(outputs + r * size + from + i * LANES, total[r][i]);
}

template <int32_t ROWS, typename Values>
QUERN_INLINE void weigh_block(const float* scores, const Values& values, int32_t count, int32_t size, const float* corrections,
                              float* outputs) {
  constexpr int32_t CHUNK = ROWS == 1 ? 64 : 32;
  int32_t d = 0;
  for (; d + CHUNK <= size; d += CHUNK) weigh<ROWS, CHUNK>(scores, values, count, size, d, corrections, outputs);
  for (; d + LANES <= size; d += LANES) weigh<ROWS, LANES>(scores, values, count, size, d, corrections, outputs);
  for (; d < size; ++d)
    for (int32_t r = 0; r < ROWS; ++r) {
      float value = outputs[r * size + d] * corrections[r];
      for (int32_t p = 0; p < count; ++p) value = fused(values.one(p, d), scores[r * STRETCH + p], value);
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

// `count` rows, at most MOST_ROWS.
template <typename Keys>
QUERN_INLINE void score_rows(int32_t count, const float* queries, int32_t depth, const Keys& keys, float* scores) {
  if (count == 3) score_blocks<3 <= MOST_ROWS ? 3 : 1>(queries, depth, keys, scores);
  if (count == 2) score_blocks<2 <= MOST_ROWS ? 2 : 1>(queries, depth, keys, scores);
  if (count == 1) score_blocks<1>(queries, depth, keys, scores);
}

template <typename Values>
QUERN_INLINE void weigh_rows(int32_t rows, const float* scores, const Values& values, int32_t here, int32_t size, const bool* seen,
                             const float* corrections, float* outputs) {
  for (int32_t r = 0, count; r < rows; r += count) {
    count = rows_of(rows - r);
    for (int32_t i = 0; i < count; ++i)
      if (!seen[r + i]) count = 1;
    const float* of = scores + r * STRETCH;
    float* to = outputs + r * size;
    if (count == 3) weigh_block<3 <= MOST_ROWS ? 3 : 1>(of, values, here, size, corrections + r, to);
    if (count == 2) weigh_block<2 <= MOST_ROWS ? 2 : 1>(of, values, here, size, corrections + r, to);
    if (count == 1 && seen[r]) weigh_block<1>(of, values, here, size, corrections + r, to);
  }
}

// The keys of KEPT blocks, of which `left` are there: what stands for the others is not looked at.
QUERN_INLINE ByteKeys byte_keys(const HeadCache& cache, const KeyValuePage* pages, int32_t left) {
  ByteKeys keys;
  for (int32_t k = 0; k < KEPT; ++k) {
    const uint8_t* codes = pages[k < left ? k : 0].keys + cache.keys_at;
    keys.codes[k] = reinterpret_cast<const int8_t*>(codes);
    keys.scales[k] = load(reinterpret_cast<const float*>(codes + cache.head_dim * BLOCK));
    keys.ahead[k] = pages[k < left ? k : 0].values + cache.values_at;
  }
  return keys;
}

// `next`: the page whose keys are fetched meanwhile.
QUERN_INLINE ByteValues byte_values(const HeadCache& cache, const KeyValuePage& page, const KeyValuePage& next) {
  const uint8_t* codes = page.values + cache.values_at;
  return {reinterpret_cast<const int8_t*>(codes), reinterpret_cast<const float*>(codes + cache.head_dim * BLOCK), cache.head_dim,
          next.keys + cache.keys_at};
}

// Fewer than 16 rows from `begin` on. `widened`: the stretch holds keys and values already.
void attend_few(const Attend& a, const Stretch& s, int32_t begin, bool widened, float* scores, float* maxima, float* sums) {
  const int32_t blocks = (s.count + BLOCK - 1) / BLOCK, rows = a.rows - begin;
  const KeyValuePage* pages = a.cache.pages + s.start / BLOCK;
  const float* queries = a.queries + static_cast<int64_t>(begin) * s.depth;
  float* outputs = a.outputs + static_cast<int64_t>(begin) * s.size;
  const bool bytes = a.cache.precision == CachePrecision::int8 && !widened && s.depth == s.size && MOST_ROWS > 1 && rows <= MOST_ROWS;
  for (int32_t b = 0; b < blocks; b += KEPT) {
    if (bytes) {
      score_rows(rows, queries, s.depth, byte_keys(a.cache, pages + b, blocks - b), scores + b * BLOCK);
      continue;
    }
    for (int32_t k = 0; !widened && k < KEPT && b + k < blocks; ++k) {
      fetch(a.cache, pages[b + k].values + a.cache.values_at);
      widen_block(a.cache, s, b + k, s.keys + k * s.depth * BLOCK);
    }
    const float* keys = widened ? s.keys + b * s.depth * BLOCK : s.keys;
    for (int32_t r = 0, count; r < rows; r += count) {
      count = rows_of(rows - r);
      score_rows(count, queries + r * s.depth, s.depth, FloatKeys{keys, s.depth}, scores + r * STRETCH + b * BLOCK);
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
    const bool more = s.start + STRETCH + b * BLOCK <= a.last[begin];
    if (!widened && !bytes) {
      if (more) fetch(a.cache, pages[STRETCH / BLOCK + b].keys + a.cache.keys_at);
      widen_values(a.cache, s.start / BLOCK + b, here, s.values);
    }
    const float* of = scores + b * BLOCK;
    if (bytes) {
      weigh_rows(rows, of, byte_values(a.cache, pages[b], pages[more ? STRETCH / BLOCK + b : b]), here, s.size, seen, corrections, outputs);
    } else {
      const FloatValues values{widened ? s.values + b * BLOCK * s.size : s.values, s.size};
      weigh_rows(rows, of, values, here, s.size, seen, corrections, outputs);
    }
    for (int32_t r = 0; r < rows; ++r) corrections[r] = 1.0f;
  }
}

