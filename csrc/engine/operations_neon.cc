#include "engine/operations-inl.h"

namespace quern {
const Operations operations_neon = TABLE;
}
