// Text to tokens and back, as the model's tokenizer does it: byte pair encoding (Sennrich et al. 2016, arXiv 1508.07909) over the
// bytes of words, or over characters with bytes as the last resort. The tables are read where they lie in the run file;
// src/quern/pipeline/run_files/tokenizer.py writes them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "program/format.h"

namespace quern {

// Little-endian numbers in a file, which begin anywhere.
class Numbers {
 public:
  Numbers() = default;
  Numbers(const uint8_t* data, uint32_t count) : data_(data), count_(count) {}
  uint32_t size() const { return count_; }
  uint32_t operator[](uint64_t i) const {
    uint32_t value;
    memcpy(&value, data_ + 4 * i, sizeof value);
    return value;
  }

 private:
  const uint8_t* data_ = nullptr;
  uint32_t count_ = 0;
};

class Tokenizer {
 public:
  // Throws BadFile for tables that do not fit each other.
  explicit Tokenizer(Cursor file);

  // Why it cannot be used; empty where it can.
  const std::string& missing() const { return missing_; }

  // Tokens of a text, behind the one that begins texts where the tokenizer has that habit. Throws std::invalid_argument for text
  // that is no UTF-8, or where `missing`.
  std::vector<int32_t> encode(const std::string& text) const;
  // The bytes of a token, which may be a part of a character; none for one that is not text. Any number is allowed.
  std::string bytes_of(int32_t token) const;
  bool ends(int32_t token) const;

 private:
  enum class Kind : uint32_t { none = 0, bytes = 1, characters = 2 };
  enum class Prepend : uint32_t { never = 0, always = 1, missing = 2, missing_first = 3 };
  struct Added {
    uint32_t token;
    bool late;  // looked for behind the others
    std::string text;
  };

  void read_tables(Cursor& file);
  void add(const std::string& text, bool late, bool first, std::vector<int32_t>& out) const;
  void add_segment(const std::string& text, bool first, std::vector<int32_t>& out) const;
  void add_characters(const std::string& text, bool first, std::vector<int32_t>& out) const;
  const Added* added_at(const std::string& text, size_t at, bool late) const;
  std::vector<uint32_t> symbols_of(const std::string& word) const;
  void merge(std::vector<uint32_t> symbols, std::vector<int32_t>& out) const;
  struct Merge {
    uint32_t rank, made;
  };
  bool merge_of(uint32_t left, uint32_t right, Merge& found) const;
  std::string text_of(uint32_t token) const;
  uint32_t token_called(const std::string& text) const;

  Kind kind_ = Kind::none;
  Prepend prepend_ = Prepend::never;
  std::string missing_;
  bool composes_ = false, whole_words_ = false, falls_back_ = false, joins_unknown_ = false, splits_spaces_ = false;
  uint32_t unknown_ = 0;
  std::vector<uint32_t> stages_;
  Numbers first_, ends_, special_;  // tokens, the last two rising
  std::vector<Added> added_;
  uint32_t tokens_ = 0;
  Numbers begins_;                  // of each token's bytes
  const uint8_t* texts_ = nullptr;
  Numbers by_text_, of_byte_;       // tokens by their bytes, rising; tokens of single bytes
  Numbers merges_;                  // left, right, rank, made: by the first two, rising
};

}  // namespace quern
