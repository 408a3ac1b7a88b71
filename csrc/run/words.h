// A text cut into words, inside of which tokens lie.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace quern {

// How words are cut, as the regular expressions of families of tokenizers have it (words.cc); the numbers are those of run files.
enum class Cut : uint32_t { gpt2 = 1, one_digit = 2, three_digits = 3, each_digit = 4, digits = 5 };
constexpr uint32_t CUTS = 5;

// Where the words of [first, last) end, one after the other, by one cut.
std::vector<size_t> word_ends(const std::vector<uint32_t>& text, size_t first, size_t last, Cut cut);

}  // namespace quern
