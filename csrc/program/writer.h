// A decoder as the program of a run file (format.h).
#pragma once

#include <string>
#include <vector>

#include "engine/decoder.h"
#include "kernels/checked_weight.h"
#include "program/format.h"

namespace quern {

// An array and where it begins in the file.
struct Placed {
  uint64_t at;
  Span bytes;
};

struct Program {
  std::string program;
  std::vector<Placed> arrays;  // in order, from the end of the header on
};

// Throws std::invalid_argument for steps that run files do not have. The arrays are the decoder's.
Program write_program(const Decoder& decoder, const ModelFacts& facts);

}  // namespace quern
