#include "run/unicode.h"

#include <algorithm>
#include <stdexcept>

namespace quern::unicode {
namespace {

// Hangul syllables are composed by a rule.
constexpr uint32_t SYLLABLES = 0xac00, LEADS = 0x1100, VOWELS = 0x1161, TAILS = 0x11a7;
constexpr uint32_t LEAD_COUNT = 19, VOWEL_COUNT = 21, TAIL_COUNT = 28, SYLLABLE_COUNT = LEAD_COUNT * VOWEL_COUNT * TAIL_COUNT;
constexpr uint32_t FIRST_COMBINING = 0x300;  // below, nothing is composed or decomposed that stands alone

// The row that `point` lies in, or null.
template <typename Row>
const Row* row_of(const Table<Row>& table, uint32_t point) {
  const Row* end = table.rows + table.count;
  const Row* found = std::lower_bound(table.rows, end, point, [](const Row& row, uint32_t p) { return row.last < p; });
  return found != end && found->first <= point ? found : nullptr;
}

const Decomposition* decomposition_of(uint32_t point) {
  const Decomposition* end = DECOMPOSITIONS.rows + DECOMPOSITIONS.count;
  const Decomposition* found = std::lower_bound(DECOMPOSITIONS.rows, end, point,
                                                [](const Decomposition& row, uint32_t p) { return row.point < p; });
  return found != end && found->point == point ? found : nullptr;
}

uint32_t combining(uint32_t point) {
  const Combining* found = point < FIRST_COMBINING ? nullptr : row_of(COMBINING, point);
  return found == nullptr ? 0 : found->number;
}

void decompose(uint32_t point, std::vector<uint32_t>& out) {
  if (point - SYLLABLES < SYLLABLE_COUNT) {
    const uint32_t index = point - SYLLABLES;
    out.push_back(LEADS + index / (VOWEL_COUNT * TAIL_COUNT));
    out.push_back(VOWELS + index % (VOWEL_COUNT * TAIL_COUNT) / TAIL_COUNT);
    if (index % TAIL_COUNT != 0) out.push_back(TAILS + index % TAIL_COUNT);
    return;
  }
  const Decomposition* found = decomposition_of(point);
  if (found == nullptr) {
    out.push_back(point);
    return;
  }
  decompose(found->first, out);
  if (found->second != 0) decompose(found->second, out);
}

// By what two code points become, in rising order of both.
std::vector<Decomposition> pairs() {
  std::vector<Decomposition> found;
  for (int32_t i = 0; i < DECOMPOSITIONS.count; ++i) {
    const Decomposition& row = DECOMPOSITIONS.rows[i];
    if (row.second != 0 && row_of(EXCLUDED, row.point) == nullptr) found.push_back(row);
  }
  std::sort(found.begin(), found.end(), [](const Decomposition& a, const Decomposition& b) {
    return a.first != b.first ? a.first < b.first : a.second < b.second;
  });
  return found;
}

// What two code points compose to; 0: nothing.
uint32_t pair_of(uint32_t first, uint32_t second) {
  if (first - LEADS < LEAD_COUNT && second - VOWELS < VOWEL_COUNT)
    return SYLLABLES + ((first - LEADS) * VOWEL_COUNT + second - VOWELS) * TAIL_COUNT;
  if (first - SYLLABLES < SYLLABLE_COUNT && (first - SYLLABLES) % TAIL_COUNT == 0 && second > TAILS && second < TAILS + TAIL_COUNT)
    return first + second - TAILS;
  static const std::vector<Decomposition> all = pairs();
  const auto found = std::lower_bound(all.begin(), all.end(), std::make_pair(first, second),
                                      [](const Decomposition& row, const std::pair<uint32_t, uint32_t>& wanted) {
                                        return std::make_pair(row.first, row.second) < wanted;
                                      });
  return found != all.end() && found->first == first && found->second == second ? found->point : 0;
}

// Bytes of the character that begins at `at`, or 0; `seen` is then how many bytes of one there are.
int32_t length_at(const std::string& text, size_t at, uint32_t& point, int32_t& seen) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const uint8_t first = byte(at);
  seen = 1;
  if (first < 0x80) {
    point = first;
    return 1;
  }
  const int32_t length = first >= 0xc2 && first < 0xe0 ? 2 : (first & 0xf0) == 0xe0 ? 3 : first >= 0xf0 && first < 0xf5 ? 4 : 0;
  if (length == 0) return 0;
  point = first & (0xff >> (length + 1));
  for (; seen < length; ++seen) {
    if (at + seen >= text.size()) return 0;
    const uint8_t next = byte(at + seen);
    uint8_t low = 0x80, high = 0xbf;
    if (seen == 1 && first == 0xe0) low = 0xa0;
    if (seen == 1 && first == 0xed) high = 0x9f;  // surrogates
    if (seen == 1 && first == 0xf0) low = 0x90;
    if (seen == 1 && first == 0xf4) high = 0x8f;
    if (next < low || next > high) return 0;
    point = point << 6 | (next & 0x3f);
  }
  return length;
}

}  // namespace

std::vector<uint32_t> decoded(const std::string& text) {
  std::vector<uint32_t> points;
  points.reserve(text.size());
  for (size_t at = 0; at < text.size();) {
    uint32_t point = 0;
    int32_t seen = 0;
    const int32_t length = length_at(text, at, point, seen);
    if (length == 0) throw std::invalid_argument("the text is not valid UTF-8 at byte " + std::to_string(at));
    points.push_back(point);
    at += length;
  }
  return points;
}

void append(std::string& text, uint32_t point) {
  const auto put = [&](uint32_t byte) { text.push_back(static_cast<char>(byte)); };
  if (point < 0x80) return put(point);
  if (point < 0x800) {
    put(0xc0 | point >> 6);
  } else {
    if (point < 0x10000) {
      put(0xe0 | point >> 12);
    } else {
      put(0xf0 | point >> 18);
      put(0x80 | (point >> 12 & 0x3f));
    }
    put(0x80 | (point >> 6 & 0x3f));
  }
  put(0x80 | (point & 0x3f));
}

std::string replaced(const std::string& text) {
  std::string made;
  for (size_t at = 0; at < text.size();) {
    uint32_t point = 0;
    int32_t seen = 0;
    const int32_t length = length_at(text, at, point, seen);
    append(made, length > 0 ? point : 0xfffd);
    at += length > 0 ? length : seen;
  }
  return made;
}

bool is_letter(uint32_t point) {
  if (point < 0x80) return (point | 32) - 'a' < 26;
  return row_of(LETTERS, point) != nullptr;
}

bool is_number(uint32_t point) {
  if (point < 0x80) return point - '0' < 10;
  return row_of(NUMBERS, point) != nullptr;
}

bool is_digit(uint32_t point) {
  if (point < 0x80) return point - '0' < 10;
  return row_of(DIGITS, point) != nullptr;
}

bool is_space(uint32_t point) {
  if (point < 0x80) return point == ' ' || point - 9 < 5;
  return row_of(SPACES, point) != nullptr;
}

std::vector<uint32_t> composed(const std::vector<uint32_t>& text) {
  if (std::all_of(text.begin(), text.end(), [](uint32_t point) { return point < FIRST_COMBINING; })) return text;
  std::vector<uint32_t> points;
  for (const uint32_t point : text) decompose(point, points);
  const auto lower = [](uint32_t a, uint32_t b) { return combining(a) < combining(b); };
  for (size_t at = 0; at < points.size();) {
    size_t end = at + 1;
    if (combining(points[at]) != 0) {
      while (end < points.size() && combining(points[end]) != 0) ++end;
      std::stable_sort(points.begin() + at, points.begin() + end, lower);
    }
    at = end;
  }
  std::vector<uint32_t> out;
  size_t starter = SIZE_MAX;
  uint32_t before = 0;  // class of the last one that stayed behind the starter; 0: none did
  for (const uint32_t point : points) {
    const uint32_t mine = combining(point);
    const bool adjacent = starter != SIZE_MAX && starter + 1 == out.size();
    if (starter != SIZE_MAX && (adjacent || before < mine)) {
      if (const uint32_t made = pair_of(out[starter], point)) {
        out[starter] = made;
        continue;
      }
    }
    if (mine == 0) {
      starter = out.size();
      before = 0;
    } else {
      before = mine;
    }
    out.push_back(point);
  }
  return out;
}

}  // namespace quern::unicode
