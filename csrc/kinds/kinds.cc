#include "kinds/kinds.h"

#include <stdexcept>

namespace quern {
namespace {

const WeightKind* const ALL[] = {&integer4, &integer8, &codebook2, &codebook3,   &codebook4,  &trellis,
                                 &bfloat16, &float32,  &float8_e4m3, &float8_e5m2,
                                 &q2_k,     &q3_k,     &q4_k,      &q5_k,        &q6_k,       &iq4_xs,
                                 &q4_1,     &q5_1,    &iq2_xxs,   &iq2_xs,      &iq2_s,      &iq3_xxs,
                                 &iq3_s};

}  // namespace

const WeightKind& kind_called(const std::string& name) {
  std::string known;
  for (const WeightKind* kind : ALL) {
    if (name == kind->name) return *kind;
    known += (known.empty() ? "" : ", ") + std::string(kind->name);
  }
  throw std::invalid_argument("unknown kind of matrix '" + name + "'; known: " + known);
}

KindKernels kernels_of(const Weight& weight, int32_t level) {
  KindKernels found{};
  for (int32_t i = level; i >= 0; --i) {
    const KindKernels* here = weight.kind->kernels[i];
    if (here == nullptr) continue;
    if (found.rows == nullptr) found.rows = here->rows;
    if (found.tile == nullptr) found.tile = here->tile;
    if (found.panel == nullptr) found.panel = here->panel;
    if (found.numbers == nullptr) found.numbers = here->numbers;
  }
  return found;
}

// AVX2 multiplies 4-bit integers as they lie faster than decoded ones, up to the tokens for which reading them again and again
// begins to count.
int32_t most_row_tokens(int32_t level) { return level == 1 && QUERN_X86 && !SMALL_CODE ? 64 : MANY_TOKENS; }

int32_t row_tokens(const Weight& weight, int32_t level) {
  return weight.kind == &integer4 && weight.group >= 64 ? most_row_tokens(level) : MANY_TOKENS;
}

}  // namespace quern
