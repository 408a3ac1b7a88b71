// Characters: UTF-8, classes, and canonical composition (NFC; Unicode Standard Annex 15).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace quern::unicode {

// Code points of a text. Throws std::invalid_argument for bytes that are no UTF-8.
std::vector<uint32_t> decoded(const std::string& text);
void append(std::string& text, uint32_t point);

// `text`, with the replacement character for what is no UTF-8: one for as many bytes as begin a character, then one a byte.
std::string replaced(const std::string& text);

bool is_letter(uint32_t point);
bool is_number(uint32_t point);
bool is_digit(uint32_t point);
bool is_space(uint32_t point);

std::vector<uint32_t> composed(const std::vector<uint32_t>& text);

// Tables by rising code points; tools/unicode_tables.py makes them.
struct Range {
  uint32_t first, last;
};
struct Combining {
  uint32_t first, last, number;
};
struct Decomposition {
  uint32_t point, first, second;
};
template <typename Row>
struct Table {
  int32_t count;
  const Row* rows;
};
extern const Table<Range> LETTERS, NUMBERS, DIGITS, SPACES, EXCLUDED;
extern const Table<Combining> COMBINING;
extern const Table<Decomposition> DECOMPOSITIONS;

}  // namespace quern::unicode
