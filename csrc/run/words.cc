// The regular expressions, by hand; alternatives are tried in order, each takes as much as it can:
//   gpt2           's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
//   one_digit      (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
//   three_digits   the same with \p{N}{1,3}
//   each_digit     every digit by itself; digits: runs of them
#include "run/words.h"

#include <algorithm>

#include "run/unicode.h"

namespace quern {
namespace {

using unicode::is_digit;
using unicode::is_letter;
using unicode::is_number;
using unicode::is_space;

bool is_line_end(uint32_t point) { return point == '\n' || point == '\r'; }
bool is_other(uint32_t point) { return !is_space(point) && !is_letter(point) && !is_number(point); }

class Words {
 public:
  Words(const std::vector<uint32_t>& text, size_t last, Cut cut) : text_(text), last_(last), cut_(cut) {}

  // The end of the word that begins at `at`.
  size_t end(size_t at) const {
    if (cut_ == Cut::each_digit || cut_ == Cut::digits) return digits(at);
    if (const size_t found = contraction(at)) return found;
    return cut_ == Cut::gpt2 ? spaced(at) : modern(at);
  }

 private:
  bool has(size_t at) const { return at < last_; }

  template <typename Is>
  size_t run(size_t at, Is is) const {
    while (has(at) && is(text_[at])) ++at;
    return at;
  }

  size_t digits(size_t at) const {
    const bool digit = is_digit(text_[at]);
    if (digit && cut_ == Cut::each_digit) return at + 1;
    return run(at, [&](uint32_t point) { return is_digit(point) == digit; });
  }

  // A letter as it is compared: small, and the long s as s, where case does not matter.
  uint32_t folded(size_t at) const {
    if (!has(at)) return 0;
    const uint32_t point = text_[at];
    if (cut_ == Cut::gpt2) return point;
    return point == 0x17f ? 's' : point - 'A' < 26 ? (point | 32) : point;
  }

  size_t contraction(size_t at) const {
    if (text_[at] != '\'') return 0;
    const uint32_t first = folded(at + 1), second = folded(at + 2);
    if (first == 's' || first == 't') return at + 2;
    if ((first == 'r' || first == 'v') && second == 'e') return at + 3;
    if (first == 'm' || first == 'd') return at + 2;
    return first == 'l' && second == 'l' ? at + 3 : 0;
  }

  size_t spaced(size_t at) const {
    const size_t from = text_[at] == ' ' ? at + 1 : at;
    if (has(from) && is_letter(text_[from])) return run(from, is_letter);
    if (has(from) && is_number(text_[from])) return run(from, is_number);
    if (has(from) && is_other(text_[from])) return run(from, is_other);
    return spaces(at);
  }

  size_t modern(size_t at) const {
    const uint32_t point = text_[at];
    if (is_letter(point)) return run(at, is_letter);
    if (!is_number(point) && !is_line_end(point) && has(at + 1) && is_letter(text_[at + 1])) return run(at + 1, is_letter);
    if (is_number(point)) {
      const size_t most = at + (cut_ == Cut::one_digit ? 1 : 3);
      return std::min(run(at, is_number), most);
    }
    const size_t from = point == ' ' ? at + 1 : at;
    if (has(from) && is_other(text_[from])) return run(run(from, is_other), is_line_end);
    size_t end = run(at, is_space);
    while (end > at && !is_line_end(text_[end - 1])) --end;
    return end > at ? end : spaces(at);
  }

  // The last one of several belongs to the word behind them.
  size_t spaces(size_t at) const {
    const size_t end = run(at, is_space);
    return has(end) && end > at + 1 ? end - 1 : end;
  }

  const std::vector<uint32_t>& text_;
  size_t last_;
  Cut cut_;
};

}  // namespace

std::vector<size_t> word_ends(const std::vector<uint32_t>& text, size_t first, size_t last, Cut cut) {
  const Words words(text, last, cut);
  std::vector<size_t> ends;
  for (size_t at = first; at < last; at = ends.back()) ends.push_back(words.end(at));
  return ends;
}

}  // namespace quern
