#include "kinds/plain_avx2-inl.h"

namespace quern {
const KindKernels bfloat16_avx2 = {plain<Float::bfloat16>, nullptr, nullptr};
}
