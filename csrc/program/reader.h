// The program of a run file (format.h) as a decoder whose arrays lie in the file.
#pragma once

#include <memory>
#include <vector>

#include "engine/decoder.h"
#include "program/format.h"

namespace quern {

struct ReadProgram {
  ModelFacts facts;
  std::unique_ptr<Decoder> decoder;
  Cursor tokenizer;  // the tokenizer's part of the file
};

// `file`, `bytes`: all of it, in memory that begins at a multiple of ALIGNMENT and outlives the decoder. Nothing in it is
// trusted: throws BadFile, std::invalid_argument or std::bad_alloc.
ReadProgram read_program(const uint8_t* file, uint64_t bytes, int threads);

}  // namespace quern
