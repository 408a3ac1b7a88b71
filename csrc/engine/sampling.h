// Choosing the next token: temperature, then top-k, then top-p, as src/quern/generation/sampling.py defines it.
#pragma once

#include <cstdint>

namespace quern {

// The likeliest token; the lowest of equals. -1 if a logit is NaN or +infinity.
int32_t likeliest(const float* logits, int32_t count);

// A token by the uniform number `place` in [0, 1); -1 as above. temperature > 0; top_k 0: all; 0 < top_p <= 1.
int32_t sample(const float* logits, int32_t count, double temperature, int32_t top_k, double top_p, double place);

}  // namespace quern
