// Plain float32 numbers.
#include "kinds/kinds.h"
#include "kinds/plain.h"

namespace quern {
namespace {

const KindKernels float32_scalar = {multiply_plain_scalar<Float::float32>, nullptr, nullptr};

}  // namespace

const WeightKind float32 = {
    "float32", true, false, false, 4, plain_row_bytes<4>, nullptr, nullptr, nullptr, decode_plain<Float::float32>,
    {&float32_scalar, FIRST_KERNELS(float32_avx2, float32_neon), AVX512_KERNELS(float32_avx512), nullptr},
};

}  // namespace quern
