// The functions of `Operations`, written once with the compiler's vector types and compiled for each instruction set. Sixteen
// lanes everywhere: a compiler with narrower registers uses several, and the order of additions stays the same.
// No include guard and no linkage: for operations_<instruction set>.cc alone.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "engine/operations.h"
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace quern {
namespace {

#define QUERN_INLINE static inline __attribute__((always_inline))

typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t Whole __attribute__((vector_size(64)));
constexpr int32_t LANES = 16;
static_assert(LANES == BLOCK, "a block of keys is one vector");

QUERN_INLINE Lanes load(const float* p) {
  Lanes v;
  memcpy(&v, p, sizeof v);
  return v;
}
QUERN_INLINE void store(float* p, Lanes v) { memcpy(p, &v, sizeof v); }
QUERN_INLINE Lanes spread(float x) { return Lanes{} + x; }
QUERN_INLINE Lanes load_some(const float* p, int32_t count) {
  Lanes v{};
  memcpy(&v, p, sizeof(float) * count);
  return v;
}

QUERN_INLINE float sum(Lanes v) {
  float lane[LANES];
  memcpy(lane, &v, sizeof v);
  for (int32_t width = LANES / 2; width > 0; width /= 2)
    for (int32_t i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}

QUERN_INLINE float largest(Lanes v) {
  float lane[LANES];
  memcpy(lane, &v, sizeof v);
  for (int32_t width = LANES / 2; width > 0; width /= 2)
    for (int32_t i = 0; i < width; ++i) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
  return lane[0];
}

// e^x to about two units in the last place (Cephes' polynomial); 0 far below, e^88 above.
QUERN_INLINE Lanes exponential(Lanes x) {
  const Lanes top = spread(88.0f), bottom = spread(-87.0f), given = x;
  x = x > top ? top : x;
  x = x < bottom ? bottom : x;
  const Lanes magic = spread(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const Lanes shifted = x * 1.44269504088896341f + magic;
  const Lanes n = shifted - magic;
  const Lanes r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Lanes p = spread(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  Whole bits, scale;
  memcpy(&bits, &shifted, sizeof bits);
  memcpy(&scale, &p, sizeof scale);
  scale += bits << 23;
  memcpy(&p, &scale, sizeof p);
  return given < bottom ? Lanes{} : p;
}

void rms_norm(const float* x, const float* weight, int32_t count, float epsilon, float* out) {
  Lanes squares{};
  int32_t i = 0;
  for (; i + LANES <= count; i += LANES) squares += load(x + i) * load(x + i);
  if (i < count) squares += load_some(x + i, count - i) * load_some(x + i, count - i);
  const float factor = 1.0f / std::sqrt(sum(squares) / static_cast<float>(count) + epsilon);
  for (i = 0; i + LANES <= count; i += LANES) store(out + i, load(x + i) * factor * load(weight + i));
  for (; i < count; ++i) out[i] = x[i] * factor * weight[i];
}

QUERN_INLINE Lanes silu(Lanes gate, Lanes up) { return gate / (exponential(-gate) + 1.0f) * up; }

void silu_product(float* gate, const float* up, int32_t count) {
  int32_t i = 0;
  for (; i + LANES <= count; i += LANES) store(gate + i, silu(load(gate + i), load(up + i)));
  if (i == count) return;
  const Lanes last = silu(load_some(gate + i, count - i), load_some(up + i, count - i));
  memcpy(gate + i, &last, sizeof(float) * (count - i));
}

void add(float* x, const float* y, int64_t count) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(x + i, load(x + i) + load(y + i));
  for (; i < count; ++i) x[i] += y[i];
}

#if defined(__F16C__)
QUERN_INLINE Lanes half_lanes(const uint16_t* p) {
  float lane[LANES];
  _mm256_storeu_ps(lane, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  _mm256_storeu_ps(lane + 8, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8))));
  return load(lane);
}
QUERN_INLINE float half_value(uint16_t h) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h))); }
QUERN_INLINE uint16_t half_of(float x) {
  return static_cast<uint16_t>(_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(x), _MM_FROUND_TO_NEAREST_INT)));
}
#else
QUERN_INLINE float half_value(uint16_t h) {
  // The exponent is moved by a multiplication, which is exact and gets subnormal numbers right.
  uint32_t bits = (h & 0x7fffu) << 13;
  float x;
  memcpy(&x, &bits, sizeof x);
  x *= 0x1p112f;
  memcpy(&bits, &x, sizeof bits);
  if ((h & 0x7c00u) == 0x7c00u) bits |= 0x7f800000u;
  bits |= static_cast<uint32_t>(h & 0x8000u) << 16;
  memcpy(&x, &bits, sizeof x);
  return x;
}
QUERN_INLINE uint16_t half_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | ((bits >> 13) & 0x3ffu));
  if (bits >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (bits < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded fraction in the low bits
    float y;
    memcpy(&y, &bits, sizeof y);
    y += 0.5f;
    memcpy(&bits, &y, sizeof bits);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
  }
  bits += 0xc8000fffu + ((bits >> 13) & 1u);
  return static_cast<uint16_t>(sign | (bits >> 13));
}
QUERN_INLINE Lanes half_lanes(const uint16_t* p) {
  Lanes v;
  for (int32_t i = 0; i < LANES; ++i) v[i] = half_value(p[i]);
  return v;
}
#endif

QUERN_INLINE Lanes byte_lanes(const int8_t* p) {
  float lane[LANES];
  for (int32_t i = 0; i < LANES; ++i) lane[i] = static_cast<float>(p[i]);
  return load(lane);
}

void to_float16(const float* x, uint16_t* out, int32_t count) {
  for (int32_t i = 0; i < count; ++i) out[i] = half_of(x[i]);
}

void from_float16(const uint16_t* x, float* out, int32_t count) {
  for (int32_t i = 0; i < count; ++i) out[i] = half_value(x[i]);
}

// Keys of one block as float32 (head_dim, BLOCK), biased and rotated where the cache holds them bare.
void widen_keys(const HeadCache& cache, int64_t block, float* keys) {
  const int32_t size = cache.head_dim, half = size / 2;
  if (cache.precision == CachePrecision::float32) {
    memcpy(keys, static_cast<const float*>(cache.keys) + block * size * BLOCK, sizeof(float) * size * BLOCK);
    return;
  }
  if (cache.precision == CachePrecision::float16) {
    const uint16_t* stored = static_cast<const uint16_t*>(cache.keys) + block * size * BLOCK;
    for (int32_t d = 0; d < size; ++d) store(keys + d * BLOCK, half_lanes(stored + d * BLOCK));
    return;
  }
  const int8_t* stored = static_cast<const int8_t*>(cache.keys) + block * size * BLOCK;
  const Lanes scale = load(cache.key_scale + block * BLOCK);
  const float* cosines = cache.cosines + block * half * BLOCK;
  const float* sines = cache.sines + block * half * BLOCK;
  for (int32_t d = 0; d < half; ++d) {
    Lanes x = byte_lanes(stored + d * BLOCK) * scale, y = byte_lanes(stored + (d + half) * BLOCK) * scale;
    if (cache.key_bias != nullptr) {
      x += cache.key_bias[d];
      y += cache.key_bias[d + half];
    }
    const Lanes c = load(cosines + d * BLOCK), s = load(sines + d * BLOCK);
    store(keys + d * BLOCK, x * c - y * s);
    store(keys + (d + half) * BLOCK, y * c + x * s);
  }
}

void widen_values(const HeadCache& cache, int64_t position, int32_t count, float* values) {
  const int32_t size = cache.head_dim;
  for (int32_t p = 0; p < count; ++p) {
    const int64_t from = (position + p) * size;
    if (cache.precision == CachePrecision::float32) {
      memcpy(values + p * size, static_cast<const float*>(cache.values) + from, sizeof(float) * size);
    } else if (cache.precision == CachePrecision::float16) {
      const uint16_t* stored = static_cast<const uint16_t*>(cache.values) + from;
      int32_t d = 0;
      for (; d + LANES <= size; d += LANES) store(values + p * size + d, half_lanes(stored + d));
      for (; d < size; ++d) values[p * size + d] = half_value(stored[d]);
    } else {
      const int8_t* stored = static_cast<const int8_t*>(cache.values) + from;
      const float scale = cache.value_scale[position + p];
      for (int32_t d = 0; d < size; ++d) values[p * size + d] = static_cast<float>(stored[d]) * scale;
    }
  }
}

constexpr int32_t STRETCH = 4 * BLOCK;  // positions between two updates of the running softmax

// Scores of one row against a stretch; positions outside first ... last get -infinity.
QUERN_INLINE void score(const float* query, const float* keys, int32_t size, int64_t start, int32_t first, int32_t last,
                        float* scores) {
  Lanes total[4] = {};
  for (int32_t d = 0; d < size; ++d)
    for (int32_t b = 0; b < 4; ++b) total[b] += load(keys + (b * size + d) * BLOCK) * query[d];
  for (int32_t b = 0; b < 4; ++b) store(scores + b * BLOCK, total[b]);
  for (int32_t p = 0; p < STRETCH; ++p)
    if (start + p < first || start + p > last) scores[p] = -INFINITY;
}

// outputs += scores . values, `size` a multiple of the chunk.
template <int32_t CHUNK>
QUERN_INLINE void weigh(const float* scores, const float* values, int32_t size, int32_t from, float correction,
                        float* outputs) {
  Lanes total[CHUNK / LANES];
  for (int32_t i = 0; i < CHUNK / LANES; ++i) total[i] = load(outputs + from + i * LANES) * correction;
  for (int32_t p = 0; p < STRETCH; ++p)
    for (int32_t i = 0; i < CHUNK / LANES; ++i) total[i] += load(values + p * size + from + i * LANES) * scores[p];
  for (int32_t i = 0; i < CHUNK / LANES; ++i) store(outputs + from + i * LANES, total[i]);
}

void attend(const Attend& a) {
  const int32_t size = a.cache.head_dim;
  float* keys = a.scratch;
  float* values = keys + STRETCH * (size + BLOCK);
  float* scores = values + STRETCH * (size + BLOCK);
  float* maxima = scores + STRETCH * a.rows;
  float* sums = maxima + a.rows;
  int32_t first = a.first[0], last = a.last[0];
  for (int32_t r = 0; r < a.rows; ++r) {
    first = a.first[r] < first ? a.first[r] : first;
    last = a.last[r] > last ? a.last[r] : last;
    maxima[r] = -INFINITY;
    sums[r] = 0.0f;
    memset(a.outputs + static_cast<int64_t>(r) * size, 0, sizeof(float) * size);
  }
  for (int64_t start = first / STRETCH * STRETCH; start <= last; start += STRETCH) {
    const int32_t count = last - start + 1 < STRETCH ? static_cast<int32_t>(last - start + 1) : STRETCH;
    const int32_t blocks = (count + BLOCK - 1) / BLOCK;
    for (int32_t b = 0; b < blocks; ++b) widen_keys(a.cache, start / BLOCK + b, keys + b * size * BLOCK);
    memset(keys + blocks * size * BLOCK, 0, sizeof(float) * (4 - blocks) * size * BLOCK);
    widen_values(a.cache, start, count, values);
    memset(values + count * size, 0, sizeof(float) * (STRETCH - count) * size);
    for (int32_t r = 0; r < a.rows; ++r) {
      if (a.last[r] < start || a.first[r] >= start + STRETCH) continue;
      float* row = scores + r * STRETCH;
      float* out = a.outputs + static_cast<int64_t>(r) * size;
      score(a.queries + static_cast<int64_t>(r) * size, keys, size, start, a.first[r], a.last[r], row);
      Lanes top = load(row);
      for (int32_t b = 1; b < 4; ++b) top = load(row + b * BLOCK) > top ? load(row + b * BLOCK) : top;
      const float found = largest(top), maximum = found > maxima[r] ? found : maxima[r];
      const float correction = sum(exponential(spread(maxima[r] - maximum))) / LANES;
      Lanes total{};
      for (int32_t b = 0; b < 4; ++b) {
        const Lanes e = exponential(load(row + b * BLOCK) - maximum);
        store(row + b * BLOCK, e);
        total += e;
      }
      sums[r] = sums[r] * correction + sum(total);
      maxima[r] = maximum;
      int32_t d = 0;
      for (; d + 64 <= size; d += 64) weigh<64>(row, values, size, d, correction, out);
      for (; d + LANES <= size; d += LANES) weigh<LANES>(row, values, size, d, correction, out);
      for (; d < size; ++d) {
        float value = out[d] * correction;
        for (int32_t p = 0; p < STRETCH; ++p) value += values[p * size + d] * row[p];
        out[d] = value;
      }
    }
  }
  for (int32_t r = 0; r < a.rows; ++r)
    for (int32_t d = 0; d < size; ++d) a.outputs[static_cast<int64_t>(r) * size + d] /= sums[r];
}

constexpr Operations TABLE = {rms_norm, silu_product, add, attend, to_float16, from_float16};

}  // namespace
}  // namespace quern
