#include "kinds/plain_neon-inl.h"

namespace quern {
const KindKernels bfloat16_neon = {multiply_plain<Float::bfloat16>, nullptr, nullptr};
}
