// Panels of the kinds that eight_rows_avx2-inl.h multiplies; for the same files.
#include "kinds/eight_rows_avx2-inl.h"
#include "kinds/panel_avx2-inl.h"

namespace quern {
namespace {

template <typename Type, int I, typename Numbers>
INLINE void decode_register(const Blocks& blocks, const Numbers& numbers, const Part& part, int32_t row, int32_t column, __m256i flips, int8_t* panel) {
  __m256i v[ROWS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
    if constexpr (Type::POINTS != 0) {
      const Values of = values_of<Type, I>(blocks, numbers, r);
      v[r] = _mm256_sign_epi8(of.codes, of.signs);
    } else {
      v[r] = _mm256_sub_epi8(values(Type{}, Register<I>{}, blocks.row[r]), _mm256_set1_epi8(Type::OFFSET));
    }
  }
  store_panel(v, part, row, column + 32 * I, flips, panel);
}

template <typename Type>
void panel(const Weight& weight, const Part& part, uint8_t flip, int8_t* panel) {
  const __m256i flips = _mm256_set1_epi8(static_cast<char>(flip));
  const Table<Type> table(weight);
  const int32_t end = part.first_column + part.columns;
  for (int32_t row = 0; row < part.rows; row += ROWS)
    for (int32_t column = part.first_column / Type::COLUMNS * Type::COLUMNS; column < end; column += Type::COLUMNS) {
      const int64_t offset = column / Type::COLUMNS * static_cast<int64_t>(Type::BYTES);
      const Blocks blocks = blocks_at(weight, table.at, part.first_row + row, part.rows - row, offset);
      const auto numbers = numbers_of(Type{}, blocks);
      decode_register<Type, 0>(blocks, numbers, part, row, column, flips, panel);
      if constexpr (Type::COLUMNS == SUPER) {
        decode_register<Type, 1>(blocks, numbers, part, row, column, flips, panel);
        decode_register<Type, 2>(blocks, numbers, part, row, column, flips, panel);
        decode_register<Type, 3>(blocks, numbers, part, row, column, flips, panel);
        decode_register<Type, 4>(blocks, numbers, part, row, column, flips, panel);
        decode_register<Type, 5>(blocks, numbers, part, row, column, flips, panel);
        decode_register<Type, 6>(blocks, numbers, part, row, column, flips, panel);
        decode_register<Type, 7>(blocks, numbers, part, row, column, flips, panel);
      }
    }
}

template <typename Type, int G, typename Numbers>
INLINE void store_numbers(const Numbers& numbers, float* scales, float* minimums) {
  if constexpr (G < Type::COLUMNS / Type::GROUP) {
    _mm256_storeu_ps(scales + G * TILE_ROWS, numbers.template scale<G>());
    if constexpr (Type::MINIMUMS) _mm256_storeu_ps(minimums + G * TILE_ROWS, numbers.template minimum<G>());
    store_numbers<Type, G + 1>(numbers, scales, minimums);
  }
}

template <typename Type>
void numbers(const Weight& weight, int32_t first, int32_t rows, float* scales, float* minimums) {
  for (int32_t row = 0; row < rows; row += ROWS)
    for (int32_t block = 0; block < weight.columns / Type::COLUMNS; ++block) {
      const Blocks blocks = blocks_at(weight, nullptr, first + row, rows - row, block * static_cast<int64_t>(Type::BYTES));
      const int64_t to = static_cast<int64_t>(block) * (Type::COLUMNS / Type::GROUP) * TILE_ROWS + row;
      store_numbers<Type, 0>(numbers_of(Type{}, blocks), scales + to, Type::MINIMUMS ? minimums + to : nullptr);
    }
}

}  // namespace
}  // namespace quern
