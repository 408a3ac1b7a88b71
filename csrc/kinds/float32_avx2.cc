#include "kinds/plain_avx2-inl.h"

namespace quern {
const KindKernels float32_avx2 = {plain<Float::float32>, nullptr, nullptr};
}
