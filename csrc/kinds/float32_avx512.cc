#include "kinds/plain_avx512-inl.h"

namespace quern {
const KindKernels float32_avx512 = {plain<Float::float32>, nullptr, nullptr};
}
