// Which instruction sets this machine has, and which of them the kernels use: chosen once, at a coarse entry.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

namespace quern {

// Instruction sets that can run here, best first; "scalar" is always the last.
std::vector<std::string> available_isas();

// An environment variable that asks for what there is not: a user's mistake, where others are the caller's.
struct BadEnvironment : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// The one in use: the environment variable QUERN_ISA where it is set, otherwise the best. Throws BadEnvironment where it
// cannot be had.
std::string active_isa();

// Use another one from now on. Throws std::invalid_argument, naming what can run here, for anything else.
void use_isa(const std::string& name);

}  // namespace quern
