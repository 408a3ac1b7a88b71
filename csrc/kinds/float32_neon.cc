#include "kinds/plain_neon-inl.h"

namespace quern {
const KindKernels float32_neon = {multiply_plain<Float::float32>, nullptr, nullptr};
}
