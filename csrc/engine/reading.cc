#include "engine/reading.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace quern {
namespace {

constexpr size_t CHUNK = 512;  // tokens that go through the blocks together

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

bool same_layers(const std::vector<CacheLayer>& a, const std::vector<CacheLayer>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const CacheLayer& x, const CacheLayer& y) {
    return x.heads == y.heads && x.head_dim == y.head_dim;
  });
}

}  // namespace

Reading::Reading(const Decoder& decoder, const std::vector<Fed>& fed, const int32_t* tokens, int64_t total) {
  const DecoderShape& shape = decoder.shape();
  require(!fed.empty(), "two counts a sequence, and at least one sequence");
  int64_t counted = 0;
  for (const Fed& one : fed) {
    require(one.count > 0, "every sequence needs at least one token");
    require(one.wanted >= 0 && one.wanted <= one.count, "no more rows are wanted than there are tokens");
    counted += one.count;
  }
  require(counted == total, "the counts must add up to the number of tokens");
  for (const Fed& one : fed) {
    require(same_layers(one.cache->shape().layers, shape.layers), "the sequence is one of another model");
    require(one.cache->rotary() >= 0, "the decoder has no such set of rotary frequencies");
    require(std::count_if(fed.begin(), fed.end(), [&](const Fed& other) { return other.cache == one.cache; }) == 1,
            "a sequence is given twice");
    const int32_t length = one.cache->length();
    require(one.cache->reserve(length + static_cast<int64_t>(one.count)),
            "the pool has room for " + std::to_string(one.cache->room() - length) + " more tokens, not " +
                std::to_string(one.count));
    for (int32_t n = 0; n < one.count; ++n) {
      const int32_t token = tokens[rows_.size()];
      require(token >= 0 && token < shape.vocabulary, "token " + std::to_string(token) + " is outside the vocabulary of " +
                                                          std::to_string(shape.vocabulary));
      rows_.push_back({one.cache, length + n, token});
      kept_.push_back(n >= one.count - one.wanted);
    }
  }
}

int64_t Reading::wanted() const { return std::count(kept_.begin(), kept_.end(), true); }

// write(outputs of the kept rows of a chunk, how many they are)
template <typename Write>
void Reading::chunks(Decoder& decoder, Write write) const {
  const int64_t width = decoder.width();
  for (size_t from = 0; from < rows_.size(); from += CHUNK) {
    const std::vector<Row> chunk(rows_.begin() + from, rows_.begin() + std::min(rows_.size(), from + CHUNK));
    float* states = decoder.forward(chunk);
    int64_t found = 0;
    for (size_t i = 0; i < chunk.size(); ++i)
      if (kept_[from + i]) {
        std::copy_n(states + static_cast<int64_t>(i) * width, width, states + found * width);
        ++found;
      }
    if (found > 0) write(states, found);
  }
}

void Reading::logits(Decoder& decoder, float* out) const {
  chunks(decoder, [&](const float* states, int64_t count) {
    decoder.logits(states, static_cast<int32_t>(count), out);
    out += count * decoder.shape().vocabulary;
  });
}

void Reading::hidden(Decoder& decoder, float* out) const {
  chunks(decoder, [&](const float* states, int64_t count) { out = std::copy_n(states, count * decoder.width(), out); });
}

}  // namespace quern
