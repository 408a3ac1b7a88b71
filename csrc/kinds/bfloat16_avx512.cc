#include "kinds/plain_avx512-inl.h"

namespace quern {
const KindKernels bfloat16_avx512 = {plain<Float::bfloat16>, nullptr, nullptr};
}
