// Plain bfloat16 numbers.
#include "kinds/kinds.h"
#include "kinds/plain.h"

namespace quern {
namespace {

const KindKernels bfloat16_scalar = {multiply_plain_scalar<Float::bfloat16>, nullptr, nullptr};

}  // namespace

const WeightKind bfloat16 = {
    "bfloat16", true, false, false, 2, plain_row_bytes<2>, nullptr, nullptr, nullptr, decode_plain<Float::bfloat16>,
    {&bfloat16_scalar, FIRST_KERNELS(bfloat16_avx2, bfloat16_neon), AVX512_KERNELS(bfloat16_avx512), nullptr},
};

}  // namespace quern
