// ggml's super-blocks; see eight_rows_avx2-inl.h.
#include "kinds/eight_rows_panel_avx2-inl.h"

namespace quern {
namespace {

using Q2KRows = Rows<Q2K, 0, 3>;
using Q3KRows = Rows<Q3K, 4, 3>;
using Q4KRows = Rows<Q4K, 0, 3>;   // 8 * 2 * 15 * 127 = 30480
using Q5KRows = Rows<Q5K, 0, 2>;   // 4 * 2 * 31 * 127 = 31496
using Q6KRows = Rows<Q6K, 32, 1>;  // 2 * 2 * 63 * 127 = 32004
using IQ4XSRows = Rows<IQ4XS, 0, 0, true>;

// The bits `mask` of every byte after a shift to the right; to the left where it is negative.
template <int SHIFT>
INLINE __m256i bits(const uint8_t* at, int mask) {
  __m256i bytes = load(at);
  if constexpr (SHIFT > 0) bytes = _mm256_srli_epi16(bytes, SHIFT);
  if constexpr (SHIFT < 0) bytes = _mm256_slli_epi16(bytes, -SHIFT);
  return _mm256_and_si256(bytes, _mm256_set1_epi8(static_cast<char>(mask)));
}

template <int I>
INLINE __m256i values(Q2K, Register<I>, const uint8_t* b) {
  return bits<I % 4 * 2>(b + 16 + I / 4 * 32, 3);
}

template <int I>
INLINE __m256i values(Q3K, Register<I>, const uint8_t* b) {
  return _mm256_or_si256(bits<I % 4 * 2>(b + 32 + I / 4 * 32, 3), bits<I - 2>(b, 4));
}

template <int I>
INLINE __m256i values(Q4K, Register<I>, const uint8_t* b) {
  return bits<I % 2 * 4>(b + 16 + I / 2 * 32, 15);
}

template <int I>
INLINE __m256i values(Q5K, Register<I>, const uint8_t* b) {
  return _mm256_or_si256(bits<I % 2 * 4>(b + 48 + I / 2 * 32, 15), bits<I - 4>(b + 16, 16));
}

template <int I>
INLINE __m256i values(Q6K, Register<I>, const uint8_t* b) {
  return _mm256_or_si256(bits<I / 2 % 2 * 4>(b + I / 4 * 64 + I % 2 * 32, 15), bits<I % 4 * 2 - 4>(b + 128 + I / 4 * 32, 48));
}

template <int I>
INLINE __m256i values(IQ4XS, Register<I>, const uint8_t* b) {
  const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(b + 8 + 16 * I)));
  const __m256i codes = _mm256_srlv_epi32(both, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4));
  const __m128i levels = _mm_loadu_si128(reinterpret_cast<const __m128i*>(IQ4_LEVELS));
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(levels), _mm256_and_si256(codes, _mm256_set1_epi8(15)));
}

struct NibbleNumbers {  // Q2_K
  __m256i words[4];
  __m256 d, d_min;
  template <int G>
  INLINE_MEMBER __m256 scale() const {
    return _mm256_mul_ps(field<G % 4 * 8>(words[G / 4], 15), d);
  }
  template <int G>
  INLINE_MEMBER __m256 minimum() const {
    return _mm256_mul_ps(field<G % 4 * 8 + 4>(words[G / 4], 15), d_min);
  }
};

INLINE __m256 negative(__m256 v) { return _mm256_xor_ps(v, _mm256_set1_ps(-0.0f)); }

INLINE NibbleNumbers numbers_of(Q2K, const Blocks& blocks) {
  NibbleNumbers n;
  load_words(blocks, 0, n.words);
  n.d = halves_at(blocks, Q2K::D_AT);
  n.d_min = negative(halves_at(blocks, Q2K::MINIMUM_AT));
  return n;
}

struct SixBitNumbers {  // Q4_K, Q5_K: bytes of six bits, four groups a word
  __m256i scales[2], minimums[2];
  __m256 d, d_min;
  template <int G>
  INLINE_MEMBER __m256 scale() const {
    return _mm256_mul_ps(field<G % 4 * 8>(scales[G / 4], 255), d);
  }
  template <int G>
  INLINE_MEMBER __m256 minimum() const {
    return _mm256_mul_ps(field<G % 4 * 8>(minimums[G / 4], 255), d_min);
  }
};

INLINE SixBitNumbers six_bit_numbers(const Blocks& blocks) {
  SixBitNumbers n;
  __m256i words[4];
  load_words(blocks, 0, words);
  n.d = lower_halves(words[0]);
  n.d_min = negative(upper_halves(words[0]));
  n.scales[0] = word_bits<0>(words[1], 63);
  n.minimums[0] = word_bits<0>(words[2], 63);
  n.scales[1] = _mm256_or_si256(word_bits<0>(words[3], 15), word_bits<2>(words[1], 48));
  n.minimums[1] = _mm256_or_si256(word_bits<4>(words[3], 15), word_bits<2>(words[2], 48));
  return n;
}

INLINE SixBitNumbers numbers_of(Q4K, const Blocks& blocks) { return six_bit_numbers(blocks); }
INLINE SixBitNumbers numbers_of(Q5K, const Blocks& blocks) { return six_bit_numbers(blocks); }

struct SignedNumbers {  // Q3_K, Q6_K: signed bytes
  __m256i words[4];
  __m256 d;
  template <int G>
  INLINE_MEMBER __m256 scale() const {
    return _mm256_mul_ps(signed_byte<G % 4>(words[G / 4]), d);
  }
};

INLINE SignedNumbers numbers_of(Q6K, const Blocks& blocks) {
  SignedNumbers n;
  load_words(blocks, 192, n.words);
  n.d = halves_at(blocks, Q6K::D_AT);
  return n;
}

INLINE SignedNumbers numbers_of(Q3K, const Blocks& blocks) {
  __m256i words[4], shifted[4];
  load_words(blocks, 94, words);  // the last sixteen bytes of the block, two before those of the scales
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m256i next = i < 3 ? words[i + 1] : _mm256_setzero_si256();
    shifted[i] = _mm256_or_si256(_mm256_srli_epi32(words[i], 16), _mm256_slli_epi32(next, 16));
  }
  const __m256i high = shifted[2], middle = _mm256_set1_epi8(32);
  SignedNumbers n;
  n.words[0] = _mm256_or_si256(word_bits<0>(shifted[0], 15), word_bits<-4>(high, 48));
  n.words[1] = _mm256_or_si256(word_bits<0>(shifted[1], 15), word_bits<-2>(high, 48));
  n.words[2] = _mm256_or_si256(word_bits<4>(shifted[0], 15), word_bits<0>(high, 48));
  n.words[3] = _mm256_or_si256(word_bits<4>(shifted[1], 15), word_bits<2>(high, 48));
#pragma GCC unroll 4
  for (__m256i& v : n.words) v = _mm256_sub_epi8(v, middle);
  n.d = lower_halves(shifted[3]);
  return n;
}

struct IQ4XSNumbers {
  __m256i low, high;
  __m256 d;
  template <int G>
  INLINE_MEMBER __m256 scale() const {
    const __m256i four = _mm256_and_si256(G == 0 ? low : _mm256_srli_epi32(low, 4 * G), _mm256_set1_epi32(15));
    const __m256i two = _mm256_and_si256(_mm256_srli_epi32(high, 12 + 2 * G), _mm256_set1_epi32(48));
    const __m256i whole = _mm256_sub_epi32(_mm256_or_si256(four, two), _mm256_set1_epi32(32));
    return _mm256_mul_ps(_mm256_cvtepi32_ps(whole), d);
  }
};

INLINE IQ4XSNumbers numbers_of(IQ4XS, const Blocks& blocks) {
  IQ4XSNumbers n;
  __m256i words[4];
  load_words(blocks, 0, words);
  n.d = lower_halves(words[0]);
  n.high = words[0];
  n.low = words[1];
  return n;
}

}  // namespace

const KindKernels q2_k_avx2 = {rows<Q2KRows>, nullptr, panel<Q2KRows>, numbers<Q2KRows>};
const KindKernels q3_k_avx2 = {rows<Q3KRows>, nullptr, panel<Q3KRows>, numbers<Q3KRows>};
const KindKernels q4_k_avx2 = {rows<Q4KRows>, nullptr, panel<Q4KRows>, numbers<Q4KRows>};
const KindKernels q5_k_avx2 = {rows<Q5KRows>, nullptr, panel<Q5KRows>, numbers<Q5KRows>};
const KindKernels q6_k_avx2 = {rows<Q6KRows>, nullptr, panel<Q6KRows>, numbers<Q6KRows>};
const KindKernels iq4_xs_avx2 = {rows<IQ4XSRows>, nullptr, panel<IQ4XSRows>, numbers<IQ4XSRows>};

}  // namespace quern
