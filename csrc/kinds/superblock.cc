// ggml's blocks, as a GGUF file holds them: in super-blocks scales of 16 or 32 columns are whole numbers times one of the block.
#include <cmath>
#include <stdexcept>
#include <string>

#include "kernels/scalar.h"
#include "kinds/kinds.h"
#include "kinds/superblock-inl.h"

namespace quern {
namespace {

struct Numbers {
  float scale, minimum;
};

template <typename Type>
Numbers numbers_of(const Weight& weight, int32_t row, int32_t group) {
  constexpr int32_t GROUPS = Type::COLUMNS / Type::GROUP;
  const uint8_t* block = blocks_of(weight, row) + group / GROUPS * static_cast<int64_t>(Type::BYTES);
  const int32_t place = group % GROUPS;
  Numbers found{};
  found.scale = scalar::number(block + Type::D_AT, Float::float16, 0) * Type::UNIT * static_cast<float>(Type::scale(block, place));
  if (Type::MINIMUMS)
    found.minimum = -(scalar::number(block + Type::MINIMUM_AT, Float::float16, 0) *
                      static_cast<float>(Type::minimum(block, place)));
  return found;
}

template <typename Type>
int32_t value(const Weight& weight, int32_t row, int32_t column) {
  const uint8_t* block = blocks_of(weight, row) + column / Type::COLUMNS * static_cast<int64_t>(Type::BYTES);
  if constexpr (Type::POINTS != 0) {
    return Type::code(weight.table, block, column % Type::COLUMNS);
  } else {
    return Type::code(block, column % Type::COLUMNS);
  }
}

template <typename Type>
void rows(const Weight& weight, const Inputs& in, int32_t first, int32_t last, float* outputs) {
  for (int32_t row = first; row < last; ++row)
    for (int32_t t = 0; t < in.tokens; ++t) {
      float out = 0.0f, low = 0.0f;
      for (int32_t g = 0; g < in.groups; ++g) {
        const int64_t at = static_cast<int64_t>(t) * in.groups + g;
        int32_t sum = 0;
        for (int32_t c = g * in.group; c < (g + 1) * in.group; ++c)
          sum += value<Type>(weight, row, c) * in.values[t * in.stride + c];
        const Numbers n = numbers_of<Type>(weight, row, g);
        out = fmaf(static_cast<float>(sum), n.scale * in.scale[at], out);
        low = fmaf(n.minimum, static_cast<float>(in.sums[at]) * in.scale[at], low);
      }
      outputs[t * in.rows + row] = Type::MINIMUMS ? out + low : out;
    }
}

template <typename Type>
void panel(const Weight& weight, const Part& part, uint8_t flip, int8_t* panel) {
  for (int32_t r = 0; r < part.rows; ++r)
    for (int32_t c = 0; c < part.columns; ++c)
      panel[(r / 16 * static_cast<int64_t>(part.blocks) + c / 4) * LANES + r % 16 * 4 + c % 4] =
          static_cast<int8_t>(value<Type>(weight, part.first_row + r, part.first_column + c) ^ flip);
}

template <typename Type>
void numbers(const Weight& weight, int32_t first, int32_t rows, float* scales, float* minimums) {
  for (int32_t g = 0; g < weight.columns / Type::GROUP; ++g)
    for (int32_t r = 0; r < rows; ++r) {
      const Numbers n = numbers_of<Type>(weight, first + r, g);
      scales[static_cast<int64_t>(g) * TILE_ROWS + r] = n.scale;
      if (Type::MINIMUMS) minimums[static_cast<int64_t>(g) * TILE_ROWS + r] = n.minimum;
    }
}

template <typename Type>
void decode(const Weight& weight, int32_t row, float* out) {
  for (int32_t c = 0; c < weight.columns; ++c) {
    const Numbers n = numbers_of<Type>(weight, row, c / Type::GROUP);
    const float scaled = static_cast<float>(value<Type>(weight, row, c)) * n.scale;
    out[c] = Type::MINIMUMS ? scaled + n.minimum : scaled;
  }
}

template <typename Type>
int64_t row_bytes(int64_t columns) {
  return (columns + Type::COLUMNS - 1) / Type::COLUMNS * Type::BYTES;
}

template <typename Type>
void check(const Weight& weight) {
  if (weight.columns % Type::COLUMNS == 0 && weight.group == Type::GROUP) return;
  throw std::invalid_argument("a matrix of " + std::string(weight.kind->name) + " has whole blocks of " +
                              std::to_string(Type::COLUMNS) + " columns in groups of " + std::to_string(Type::GROUP) +
                              "; this one has " + std::to_string(weight.columns) + " columns in groups of " +
                              std::to_string(weight.group));
}

template <typename Type>
int64_t table_bytes(const Weight&) {
  return Type::POINTS * Type::WIDTH;
}

template <typename Type>
constexpr KindKernels SCALAR = {rows<Type>, nullptr, panel<Type>, numbers<Type>};

template <typename Type>
constexpr WeightKind kind(const char* name, const KindKernels* avx2, const KindKernels* avx512 = nullptr) {
  return {name, false, false, false, 1, row_bytes<Type>, nullptr, Type::POINTS == 0 ? nullptr : table_bytes<Type>, check<Type>, decode<Type>,
          {&SCALAR<Type>, avx2, avx512, nullptr}, Type::MINIMUMS};
}

}  // namespace

const WeightKind q2_k = kind<Q2K>("q2_k", X86_KERNELS(q2_k_avx2), AVX512_KERNELS(q2_k_avx512));
const WeightKind q3_k = kind<Q3K>("q3_k", X86_KERNELS(q3_k_avx2), AVX512_KERNELS(q3_k_avx512));
const WeightKind q4_k = kind<Q4K>("q4_k", X86_KERNELS(q4_k_avx2), AVX512_KERNELS(q4_k_avx512));
const WeightKind q5_k = kind<Q5K>("q5_k", X86_KERNELS(q5_k_avx2), AVX512_KERNELS(q5_k_avx512));
const WeightKind q6_k = kind<Q6K>("q6_k", X86_KERNELS(q6_k_avx2), AVX512_KERNELS(q6_k_avx512));
const WeightKind iq4_xs = kind<IQ4XS>("iq4_xs", X86_KERNELS(iq4_xs_avx2), AVX512_KERNELS(iq4_xs_avx512));
const WeightKind q4_1 = kind<Q41>("q4_1", X86_KERNELS(q4_1_avx2));
const WeightKind q5_1 = kind<Q51>("q5_1", X86_KERNELS(q5_1_avx2));
const WeightKind iq2_xxs = kind<IQ2XXS>("iq2_xxs", X86_KERNELS(iq2_xxs_avx2));
const WeightKind iq2_xs = kind<IQ2XS>("iq2_xs", X86_KERNELS(iq2_xs_avx2));
const WeightKind iq2_s = kind<IQ2S>("iq2_s", X86_KERNELS(iq2_s_avx2));
const WeightKind iq3_xxs = kind<IQ3XXS>("iq3_xxs", X86_KERNELS(iq3_xxs_avx2));
const WeightKind iq3_s = kind<IQ3S>("iq3_s", X86_KERNELS(iq3_s_avx2));

}  // namespace quern
