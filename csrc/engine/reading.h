// Feeding a decoder tokens of one or several sequences: what it is given is checked, and goes through its steps in chunks.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/decoder.h"

namespace quern {

// What one sequence is fed.
struct Fed {
  SequenceCache* cache;
  int32_t count;   // of tokens
  int32_t wanted;  // the last ones of them, whose outputs are read
};

class Reading {
 public:
  // `tokens`: those of all sequences, one after the other. Throws std::invalid_argument where something does not fit, and
  // takes the pages that the tokens need.
  Reading(const Decoder& decoder, const std::vector<Fed>& fed, const int32_t* tokens, int64_t total);

  int64_t wanted() const;  // rows of what is read
  // (wanted, vocabulary), and (wanted, width): what the head reads. Either may be called, once.
  void logits(Decoder& decoder, float* out) const;
  void hidden(Decoder& decoder, float* out) const;

 private:
  template <typename Write>
  void chunks(Decoder& decoder, Write write) const;

  std::vector<Row> rows_;
  std::vector<bool> kept_;
};

}  // namespace quern
