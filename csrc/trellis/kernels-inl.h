// The functions of `TrellisKernels`, written once over sixteen lanes of int32 and compiled for each instruction set.
// No include guard and no linkage: for kernels_<instruction set>.cc alone.

#include <cstdint>
#include <cstring>

#include "trellis/kernels.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace quern {
namespace {

#define QUERN_INLINE static inline __attribute__((always_inline))

#if defined(__AVX512VNNI__)

// GCC 12's own intrinsics begin with a register that they never set.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

typedef __m512i Lanes;
QUERN_INLINE Lanes load(const int32_t* p) { return _mm512_loadu_si512(p); }
QUERN_INLINE void store(int32_t* p, Lanes a) { _mm512_storeu_si512(p, a); }
QUERN_INLINE Lanes spread(int32_t x) { return _mm512_set1_epi32(x); }
QUERN_INLINE Lanes least(Lanes a, Lanes b) { return _mm512_min_epi32(a, b); }
QUERN_INLINE Lanes add_product(Lanes sum, Lanes a, Lanes b) { return _mm512_dpwssd_epi32(sum, a, b); }
QUERN_INLINE Lanes replace(Lanes a, Lanes mask, Lanes b) { return _mm512_ternarylogic_epi32(mask, b, a, 0xCA); }
QUERN_INLINE void store_low_bytes(uint8_t* p, Lanes a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a));
}
QUERN_INLINE void keep_lower(Lanes& best, Lanes& which, Lanes cost, Lanes index) {
  const __mmask16 lower = _mm512_cmplt_epi32_mask(cost, best);
  best = _mm512_mask_mov_epi32(best, lower, cost);
  which = _mm512_mask_mov_epi32(which, lower, index);
}

#elif defined(__AVX2__)

struct Lanes {
  __m256i low, high;
};
QUERN_INLINE Lanes load(const int32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))};
}
QUERN_INLINE void store(int32_t* p, Lanes a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.low);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), a.high);
}
QUERN_INLINE Lanes spread(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
QUERN_INLINE Lanes least(Lanes a, Lanes b) { return {_mm256_min_epi32(a.low, b.low), _mm256_min_epi32(a.high, b.high)}; }
QUERN_INLINE Lanes add_product(Lanes sum, Lanes a, Lanes b) {
  return {_mm256_add_epi32(sum.low, _mm256_madd_epi16(a.low, b.low)),
          _mm256_add_epi32(sum.high, _mm256_madd_epi16(a.high, b.high))};
}
QUERN_INLINE Lanes replace(Lanes a, Lanes mask, Lanes b) {
  return {_mm256_or_si256(_mm256_andnot_si256(mask.low, a.low), _mm256_and_si256(mask.low, b.low)),
          _mm256_or_si256(_mm256_andnot_si256(mask.high, a.high), _mm256_and_si256(mask.high, b.high))};
}
QUERN_INLINE void store_low_bytes(uint8_t* p, Lanes a) {
  const __m256i order = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8, 12, -1, -1,
                                         -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i pick = _mm256_setr_epi32(0, 4, 1, 1, 1, 1, 1, 1);
  const __m256i low = _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(a.low, order), pick);
  const __m256i high = _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(a.high, order), pick);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_unpacklo_epi64(_mm256_castsi256_si128(low), _mm256_castsi256_si128(high)));
}
QUERN_INLINE void keep_lower(Lanes& best, Lanes& which, Lanes cost, Lanes index) {
  const Lanes lower{_mm256_cmpgt_epi32(best.low, cost.low), _mm256_cmpgt_epi32(best.high, cost.high)};
  best = replace(best, lower, cost);
  which = replace(which, lower, index);
}

#else

struct Lanes {
  int32_t lane[TRELLIS_LANES];
};
#define QUERN_EACH for (int32_t i = 0; i < TRELLIS_LANES; ++i)
QUERN_INLINE Lanes load(const int32_t* p) {
  Lanes a;
  memcpy(a.lane, p, sizeof a.lane);
  return a;
}
QUERN_INLINE void store(int32_t* p, Lanes a) { memcpy(p, a.lane, sizeof a.lane); }
QUERN_INLINE Lanes spread(int32_t x) {
  Lanes a;
  QUERN_EACH a.lane[i] = x;
  return a;
}
QUERN_INLINE Lanes least(Lanes a, Lanes b) {
  QUERN_EACH a.lane[i] = a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i];
  return a;
}
QUERN_INLINE int32_t low_half(int32_t a) { return static_cast<int16_t>(a & 0xFFFF); }
QUERN_INLINE Lanes add_product(Lanes sum, Lanes a, Lanes b) {
  QUERN_EACH sum.lane[i] += low_half(a.lane[i]) * low_half(b.lane[i]) + (a.lane[i] >> 16) * (b.lane[i] >> 16);
  return sum;
}
QUERN_INLINE Lanes replace(Lanes a, Lanes mask, Lanes b) {
  QUERN_EACH a.lane[i] = (a.lane[i] & ~mask.lane[i]) | (b.lane[i] & mask.lane[i]);
  return a;
}
QUERN_INLINE void store_low_bytes(uint8_t* p, Lanes a) { QUERN_EACH p[i] = static_cast<uint8_t>(a.lane[i] & 0xFF); }
QUERN_INLINE void keep_lower(Lanes& best, Lanes& which, Lanes cost, Lanes index) {
  QUERN_EACH {
    const bool lower = cost.lane[i] < best.lane[i];
    best.lane[i] = lower ? cost.lane[i] : best.lane[i];
    which.lane[i] = lower ? index.lane[i] : which.lane[i];
  }
}

#endif

// One step. The states that differ only in their highest bits are entered from the same states, so these are read once.
template <int32_t BITS, bool KEEP>
QUERN_INLINE void step(const TrellisBranches& code, Lanes input, const int32_t* from, int32_t* to, uint8_t* history) {
  constexpr int32_t branches = 1 << BITS;
  const int32_t states = 1 << (code.span - BITS);
  const int32_t groups = code.span >= 2 * BITS ? 1 << (code.span - 2 * BITS) : 1;
  const Lanes mask = spread(branches - 1);
  for (int32_t group = 0; group < groups; ++group) {
    Lanes base[branches];
    for (int32_t j = 0; j < branches; ++j) {
      const int32_t state = ((group << BITS) | j) & (states - 1);
      base[j] = replace(load(from + state * TRELLIS_LANES), mask, spread(j));
    }
    for (int32_t state = group; state < states; state += groups) {
      const int32_t* pairs = code.pairs + (state << BITS);
      Lanes best = add_product(base[0], input, spread(pairs[0]));
      for (int32_t j = 1; j < branches; ++j) best = least(best, add_product(base[j], input, spread(pairs[j])));
      store(to + state * TRELLIS_LANES, best);
      if (KEEP) store_low_bytes(history + state * TRELLIS_LANES, best);
    }
  }
}

// The states that differ only in their lowest bits lead to the same states.
template <int32_t BITS>
QUERN_INLINE void step_back(const TrellisBranches& code, Lanes input, const int32_t* from, int32_t* to) {
  constexpr int32_t branches = 1 << BITS;
  const int32_t state_bits = code.span - BITS, states = 1 << state_bits;
  const int32_t alike = states < branches ? states : branches;
  for (int32_t group = 0; group < states; group += alike) {
    Lanes base[branches];
    for (int32_t i = 0; i < branches; ++i) base[i] = load(from + ((i << state_bits | group) >> BITS) * TRELLIS_LANES);
    for (int32_t state = group; state < group + alike; ++state) {
      const int32_t* pairs = code.pairs + state;
      Lanes best = add_product(base[0], input, spread(pairs[0]));
      for (int32_t i = 1; i < branches; ++i)
        best = least(best, add_product(base[i], input, spread(pairs[int64_t{i} << state_bits])));
      store(to + state * TRELLIS_LANES, best);
    }
  }
}

template <int32_t BITS>
int32_t* backward_steps(const TrellisBranches& code, const int32_t* inputs, int32_t steps, int32_t* costs, int32_t* spare) {
  for (int32_t t = steps - 1; t >= 0; --t) {
    step_back<BITS>(code, load(inputs + t * TRELLIS_LANES), costs, spare);
    int32_t* swapped = costs;
    costs = spare;
    spare = swapped;
  }
  return costs;
}

int32_t* backward(const TrellisBranches& code, const int32_t* inputs, int32_t steps, int32_t* costs, int32_t* spare) {
  switch (code.bits) {
    case 2: return backward_steps<2>(code, inputs, steps, costs, spare);
    case 3: return backward_steps<3>(code, inputs, steps, costs, spare);
    default: return backward_steps<4>(code, inputs, steps, costs, spare);
  }
}

void find_least(const int32_t* costs, int32_t count, int32_t bits, int32_t* which, int32_t* lowest) {
  const Lanes mask = spread((1 << bits) - 1), none = spread(0);
  Lanes best = spread(INT32_MAX), index = none;
  for (int32_t i = 0; i < count; ++i)
    keep_lower(best, index, replace(load(costs + i * TRELLIS_LANES), mask, none), spread(i));
  store(which, index);
  store(lowest, best);
}

template <int32_t BITS>
int32_t* forward_steps(const TrellisBranches& code, const int32_t* inputs, int32_t steps, int32_t* costs, int32_t* spare,
                       uint8_t* history) {
  const int64_t stride = int64_t{TRELLIS_LANES} << (code.span - BITS);
  for (int32_t t = 0; t < steps; ++t) {
    const Lanes input = load(inputs + t * TRELLIS_LANES);
    if (history)
      step<BITS, true>(code, input, costs, spare, history + t * stride);
    else
      step<BITS, false>(code, input, costs, spare, nullptr);
    int32_t* swapped = costs;
    costs = spare;
    spare = swapped;
  }
  return costs;
}

int32_t* forward(const TrellisBranches& code, const int32_t* inputs, int32_t steps, int32_t* costs, int32_t* spare,
                 uint8_t* history) {
  switch (code.bits) {
    case 2: return forward_steps<2>(code, inputs, steps, costs, spare, history);
    case 3: return forward_steps<3>(code, inputs, steps, costs, spare, history);
    default: return forward_steps<4>(code, inputs, steps, costs, spare, history);
  }
}

void search(const TrellisBranches& code, const int32_t* inputs, int32_t steps, int32_t circle, uint32_t* best) {
  int32_t shift[TRELLIS_LANES];
  for (int32_t t = 0; t < steps; ++t) {
    shift[t] = (code.bits * (t + 1) - code.span) % circle;
    if (shift[t] < 0) shift[t] += circle;
  }
  const uint64_t copies = circle == 8 ? 0x0101010101010101u : 0x0001000100010001u;
  const uint64_t window = (uint64_t{1} << code.span) - 1;
  Lanes lowest = spread(INT32_MAX), which = spread(0);
  for (int32_t stream = 0; stream < 1 << circle; ++stream) {
    const uint64_t around = static_cast<uint64_t>(stream) * copies;
    Lanes cost = spread(0);
    for (int32_t t = 0; t < steps; ++t)
      cost = add_product(cost, load(inputs + t * TRELLIS_LANES), spread(code.pairs[around >> shift[t] & window]));
    keep_lower(lowest, which, cost, spread(stream));
  }
  int32_t found[TRELLIS_LANES];
  store(found, which);
  memcpy(best, found, sizeof found);
}

#define QUERN_TABLE \
  { forward, backward, find_least, search }

}  // namespace
}  // namespace quern
