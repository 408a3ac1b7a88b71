#include "run/tokenizer.h"

#include <algorithm>
#include <queue>
#include <stdexcept>

#include "run/unicode.h"
#include "run/words.h"

namespace quern {
namespace {

constexpr uint32_t NONE = UINT32_MAX;
constexpr uint32_t LOW_LINE = 0x2581;  // stands for a space

void require(bool condition, const char* message) {
  if (!condition) throw BadFile(message);
}

Numbers numbers(Cursor& file) {
  const uint32_t count = file.count(4);
  return {file.take(4ull * count), count};
}

bool has(const Numbers& rising, uint32_t wanted) {
  uint32_t low = 0, high = rising.size();
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    if (rising[middle] < wanted)
      low = middle + 1;
    else
      high = middle;
  }
  return low < rising.size() && rising[low] == wanted;
}

}  // namespace

Tokenizer::Tokenizer(Cursor file) {
  const uint32_t kind = file.number<uint32_t>();
  require(kind <= 2, "its tokenizer is of no known kind");
  kind_ = static_cast<Kind>(kind);
  missing_ = file.text();
  ends_ = numbers(file);
  if (kind_ != Kind::none) read_tables(file);
  require(file.done(), "its tokenizer goes on behind its end");
  if (kind_ == Kind::none && missing_.empty()) missing_ = "the file has no tokenizer";
}

void Tokenizer::read_tables(Cursor& file) {
  const uint32_t flags = file.number<uint32_t>(), prepend = file.number<uint32_t>();
  require(prepend <= 3, "its tokenizer begins texts in no known way");
  composes_ = flags & 1;
  whole_words_ = flags & 2;
  falls_back_ = flags & 4;
  joins_unknown_ = flags & 8;
  splits_spaces_ = flags & 16;
  prepend_ = static_cast<Prepend>(prepend);
  unknown_ = file.number<uint32_t>();
  const Numbers stages = numbers(file);
  for (uint32_t i = 0; i < stages.size(); ++i) {
    require(stages[i] >= 1 && stages[i] <= CUTS, "its tokenizer cuts words in no known way");
    stages_.push_back(stages[i]);
  }
  require(stages_.size() <= CUTS, "its tokenizer cuts words too often");
  first_ = numbers(file);
  special_ = numbers(file);
  for (uint32_t left = file.count(12); left > 0; --left) {
    const uint32_t token = file.number<uint32_t>(), late = file.number<uint32_t>();
    added_.push_back({token, late != 0, file.text()});
    require(!added_.back().text.empty(), "its tokenizer has an empty token");
  }
  tokens_ = file.number<uint32_t>();
  require(tokens_ < INT32_MAX, "its tokenizer has too many tokens");
  const uint64_t places = static_cast<uint64_t>(tokens_) + 1;
  begins_ = {file.take(4 * places), static_cast<uint32_t>(places)};
  for (uint32_t i = 0; i < tokens_; ++i) require(begins_[i] <= begins_[i + 1], "its tokens' bytes are in no order");
  texts_ = file.take(begins_[tokens_]);
  require(begins_[0] == 0, "its tokens' bytes are in no order");
  by_text_ = numbers(file);
  of_byte_ = {file.take(4 * 256), 256};
  const uint32_t merges = file.count(16);
  merges_ = {file.take(16ull * merges), 4 * merges};
  for (uint32_t i = 0; i < by_text_.size(); ++i) require(by_text_[i] < tokens_, "its tokenizer names a token that it has not");
  for (uint32_t i = 0; i < 256; ++i)
    require(of_byte_[i] < tokens_ || of_byte_[i] == NONE, "its tokenizer names a token that it has not");
  for (uint64_t i = 0; i < merges; ++i) require(merges_[4 * i + 3] < tokens_, "its tokenizer names a token that it has not");
  require(unknown_ == NONE || unknown_ < tokens_, "its tokenizer names a token that it has not");
  for (const Numbers& some : {first_, special_, ends_})
    for (uint32_t i = 0; i < some.size(); ++i) require(some[i] < INT32_MAX, "its tokenizer names a token that it has not");
  for (const Added& token : added_) require(token.token < INT32_MAX, "its tokenizer names a token that it has not");
}

bool Tokenizer::ends(int32_t token) const { return has(ends_, static_cast<uint32_t>(token)); }

std::string Tokenizer::text_of(uint32_t token) const {
  if (token >= tokens_) return {};
  const uint32_t begin = begins_[token];
  return std::string(reinterpret_cast<const char*>(texts_ + begin), begins_[token + 1] - begin);
}

std::string Tokenizer::bytes_of(int32_t token) const {
  if (token < 0 || has(special_, static_cast<uint32_t>(token))) return {};
  const std::string text = text_of(static_cast<uint32_t>(token));
  if (kind_ != Kind::characters) return text;
  for (uint32_t byte = 0; byte < 256; ++byte)
    if (of_byte_[byte] == static_cast<uint32_t>(token)) return std::string(1, static_cast<char>(byte));
  std::string mark, spaced;
  unicode::append(mark, LOW_LINE);
  for (size_t at = 0; at < text.size();) {
    const bool space = text.compare(at, mark.size(), mark) == 0;
    spaced += space ? ' ' : text[at];
    at += space ? mark.size() : 1;
  }
  return spaced;
}

// By the bytes as the vocabulary has them; NONE where there is no such token.
uint32_t Tokenizer::token_called(const std::string& text) const {
  uint32_t low = 0, high = by_text_.size();
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    if (text_of(by_text_[middle]) < text)
      low = middle + 1;
    else
      high = middle;
  }
  return low < by_text_.size() && text_of(by_text_[low]) == text ? by_text_[low] : NONE;
}

bool Tokenizer::merge_of(uint32_t left, uint32_t right, Merge& found) const {
  uint64_t low = 0, high = merges_.size() / 4;
  const uint64_t count = high;
  while (low < high) {
    const uint64_t middle = low + (high - low) / 2;
    const uint32_t a = merges_[4 * middle], b = merges_[4 * middle + 1];
    if (a < left || (a == left && b < right))
      low = middle + 1;
    else
      high = middle;
  }
  if (low == count || merges_[4 * low] != left || merges_[4 * low + 1] != right) return false;
  found = {merges_[4 * low + 2], merges_[4 * low + 3]};
  return true;
}

// Neighbours become one, those of the lowest rank first, of equals the leftmost.
void Tokenizer::merge(std::vector<uint32_t> symbols, std::vector<int32_t>& out) const {
  struct Pair {
    uint32_t rank;
    size_t at;
    uint32_t left, right, made;
    bool operator<(const Pair& other) const { return rank != other.rank ? rank > other.rank : at > other.at; }
  };
  const size_t count = symbols.size();
  std::vector<size_t> next(count), before(count);
  for (size_t i = 0; i < count; ++i) {
    next[i] = i + 1;
    before[i] = i - 1;
  }
  std::priority_queue<Pair> waiting;
  const auto look = [&](size_t left, size_t right) {
    Merge found;
    if (left < count && right < count && merge_of(symbols[left], symbols[right], found))
      waiting.push({found.rank, left, symbols[left], symbols[right], found.made});
  };
  for (size_t i = 0; i + 1 < count; ++i) look(i, i + 1);
  std::vector<bool> gone(count);
  while (!waiting.empty()) {
    const Pair pair = waiting.top();
    waiting.pop();
    if (gone[pair.at]) continue;
    const size_t right = next[pair.at];
    if (right >= count || symbols[pair.at] != pair.left || symbols[right] != pair.right) continue;
    symbols[pair.at] = pair.made;
    gone[right] = true;
    next[pair.at] = next[right];
    if (next[right] < count) before[next[right]] = pair.at;
    look(before[pair.at], pair.at);
    look(pair.at, next[pair.at]);
  }
  for (size_t i = 0; i < count; i = next[i]) out.push_back(static_cast<int32_t>(symbols[i]));
}

// What merging begins with: bytes, or characters.
std::vector<uint32_t> Tokenizer::symbols_of(const std::string& word) const {
  std::vector<uint32_t> symbols;
  const auto put_bytes = [&](const std::string& bytes) {
    for (const char byte : bytes)
      if (const uint32_t token = of_byte_[static_cast<uint8_t>(byte)]; token != NONE) symbols.push_back(token);
  };
  if (kind_ == Kind::bytes) {
    put_bytes(word);
    return symbols;
  }
  bool unknown = false;
  for (const uint32_t point : unicode::decoded(word)) {
    std::string character;
    unicode::append(character, point);
    const uint32_t token = token_called(character);
    const bool known = token != NONE;
    if (known)
      symbols.push_back(token);
    else if (falls_back_)
      put_bytes(character);
    else if (unknown_ != NONE && !(unknown && joins_unknown_))
      symbols.push_back(unknown_);
    unknown = !known && !falls_back_;
  }
  return symbols;
}

const Tokenizer::Added* Tokenizer::added_at(const std::string& text, size_t at, bool late) const {
  const Added* longest = nullptr;
  for (const Added& token : added_)
    if (token.late == late && token.text[0] == text[at] && text.compare(at, token.text.size(), token.text) == 0 &&
        (longest == nullptr || token.text.size() > longest->text.size()))
      longest = &token;
  return longest;
}

void Tokenizer::add_characters(const std::string& text, bool first, std::vector<int32_t>& out) const {
  std::string mark, changed;
  unicode::append(mark, LOW_LINE);
  if (prepend_ == Prepend::always) changed = mark;
  const bool asked = prepend_ == Prepend::missing || (prepend_ == Prepend::missing_first && first);
  if (asked && text[0] != ' ' && text.compare(0, mark.size(), mark) != 0) changed = mark;
  for (const char byte : text) {
    if (byte == ' ')
      changed += mark;
    else
      changed += byte;
  }
  for (size_t at = 0; at < changed.size();) {
    const size_t next = splits_spaces_ ? changed.find(mark, at + 1) : std::string::npos;
    const std::string word = changed.substr(at, next - at);
    const uint32_t whole = whole_words_ ? token_called(word) : NONE;
    if (whole != NONE)
      out.push_back(static_cast<int32_t>(whole));
    else
      merge(symbols_of(word), out);
    at = next == std::string::npos ? changed.size() : next;
  }
}

void Tokenizer::add_segment(const std::string& text, bool first, std::vector<int32_t>& out) const {
  if (kind_ == Kind::characters) return add_characters(text, first, out);
  std::vector<uint32_t> points = unicode::decoded(text);
  if (composes_) points = unicode::composed(points);
  std::vector<size_t> ends{points.size()};
  for (const uint32_t stage : stages_) {
    std::vector<size_t> finer;
    size_t from = 0;
    for (const size_t end : ends) {
      for (const size_t cut : word_ends(points, from, end, static_cast<Cut>(stage))) finer.push_back(cut);
      from = end;
    }
    ends = std::move(finer);
  }
  size_t at = 0;
  for (const size_t end : ends) {
    std::string word;
    for (; at < end; ++at) unicode::append(word, points[at]);
    const uint32_t whole = whole_words_ ? token_called(word) : NONE;
    if (whole != NONE)
      out.push_back(static_cast<int32_t>(whole));
    else
      merge(symbols_of(word), out);
  }
}

// Added tokens stand for themselves; what lies between them is cut and merged.
void Tokenizer::add(const std::string& text, bool late, bool first, std::vector<int32_t>& out) const {
  const auto rest = [&](size_t from, size_t end) {
    if (from == end) return;
    const std::string part = text.substr(from, end - from);
    late ? add_segment(part, first && from == 0, out) : add(part, true, first && from == 0, out);
  };
  size_t from = 0;
  for (size_t at = 0; at < text.size();) {
    const Added* found = added_.empty() ? nullptr : added_at(text, at, late);
    if (found == nullptr) {
      ++at;
      continue;
    }
    rest(from, at);
    out.push_back(static_cast<int32_t>(found->token));
    from = at += found->text.size();
  }
  rest(from, text.size());
}

std::vector<int32_t> Tokenizer::encode(const std::string& text) const {
  if (!missing_.empty()) throw std::invalid_argument(missing_);
  unicode::decoded(text);
  std::vector<int32_t> ids, all;
  add(text, false, true, ids);
  for (uint32_t i = 0; i < first_.size(); ++i) all.push_back(static_cast<int32_t>(first_[i]));
  if (all.size() <= ids.size() && std::equal(all.begin(), all.end(), ids.begin())) return ids;  // the text spells it
  all.insert(all.end(), ids.begin(), ids.end());
  return all;
}

}  // namespace quern
