// The inner loops of the trellis encoder, one table of functions for each instruction set. All arithmetic is on integers, so
// that every instruction set finds the same codes.
#pragma once

#include <cstdint>
#include <string>

namespace quern {

constexpr int32_t TRELLIS_LANES = 16;     // sequences that are coded side by side
constexpr int32_t TRELLIS_MAX_BITS = 4;   // bits of a weight
constexpr int32_t TRELLIS_MAX_SPAN = 14;  // bits of the stream that a value may depend on

// A branch of the trellis is a `span`-bit window w of the stream, the newest `bits` highest; it leads from the state
// w % 2^(span - bits) to the state w >> bits and stands for an integer c. Against an input x its cost is (x - c)^2, of which
// x^2 is left out, for it is common to all. An input is the pair of int16 (u, v) = (2 x f, f), u in the low half, f the
// fixed point; a branch is the pair (-c, c^2 - 2^15), shifted so that it fits. A cost is then one multiply-add of pairs.
// u and f are multiples of 2^bits: the low bits of a cost say which of the 2^bits branches into a state was the best.
struct TrellisBranches {
  int32_t bits, span;
  const int32_t* pairs;  // 2^span
};

struct TrellisKernels {
  // Viterbi over `steps` steps. `costs` and `spare` are (2^(span - bits), lanes); returns the one of the two that holds the
  // costs after the last step. `history` is null or (steps, 2^(span - bits), lanes): in its low bits the branch taken.
  int32_t* (*forward)(const TrellisBranches& code, const int32_t* inputs, int32_t steps, int32_t* costs, int32_t* spare,
                      uint8_t* history);
  // The same against the stream: from costs of the states after the last step to the least cost of going on from each state
  // before the first. The low bits are not marked.
  int32_t* (*backward)(const TrellisBranches& code, const int32_t* inputs, int32_t steps, int32_t* costs, int32_t* spare);
  // The index of the least cost of each lane among `count`, the first of equals. The low `bits` do not count.
  void (*find_least)(const int32_t* costs, int32_t count, int32_t bits, int32_t* which, int32_t* lowest);
  // The best of all 2^circle streams that are read around the end of `circle` bits; the least one of equals.
  void (*search)(const TrellisBranches& code, const int32_t* inputs, int32_t steps, int32_t circle, uint32_t* best);
};

extern const TrellisKernels trellis_kernels_scalar;
extern const TrellisKernels trellis_kernels_avx2;
extern const TrellisKernels trellis_kernels_avx512;

// Of the instruction set `isa`, one of kernels/dispatch.h's.
const TrellisKernels& trellis_kernels(const std::string& isa);

}  // namespace quern
