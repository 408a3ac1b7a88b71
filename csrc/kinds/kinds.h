// The kinds of weights and the parts of them that the files of an instruction set export.
#pragma once

#include "kernels/isas.h"
#include "kernels/kind.h"

namespace quern {

extern const WeightKind integer4, integer8, codebook2, codebook3, codebook4, trellis, bfloat16, float32, float8_e4m3,
    float8_e5m2, q2_k, q3_k, q4_k, q5_k, q6_k, iq4_xs, q4_1,
    q5_1, iq2_xxs, iq2_xs, iq2_s, iq3_xxs, iq3_s;

extern const KindKernels codebook2_scalar, codebook3_scalar, codebook4_scalar;

extern const KindKernels integer4_avx2, integer8_avx2, codebook2_avx2, codebook3_avx2, codebook4_avx2, trellis_avx2, bfloat16_avx2, float32_avx2, float8_e4m3_avx2, float8_e5m2_avx2;
extern const KindKernels q2_k_avx2, q3_k_avx2, q4_k_avx2, q5_k_avx2, q6_k_avx2, iq4_xs_avx2;
extern const KindKernels q4_1_avx2, q5_1_avx2, iq2_xxs_avx2, iq2_xs_avx2, iq2_s_avx2, iq3_xxs_avx2, iq3_s_avx2;
extern const KindKernels integer4_avx512, integer8_avx512, codebook2_avx512, codebook3_avx512, codebook4_avx512,
    trellis_avx512, bfloat16_avx512, float32_avx512, float8_e4m3_avx512, float8_e5m2_avx512;
extern const KindKernels integer4_neon, integer8_neon, codebook2_neon, codebook3_neon, codebook4_neon, trellis_neon, bfloat16_neon, float32_neon;
extern const KindKernels q2_k_avx512, q3_k_avx512, q4_k_avx512, q5_k_avx512, q6_k_avx512, iq4_xs_avx512;

// Those of an instruction set of x86-64, where this is one.
#if QUERN_X86
#define X86_KERNELS(kernels) &kernels
#else
#define X86_KERNELS(kernels) nullptr
#endif
// Those of the lowest one of x86-64 or of ARM, whichever this is.
#if QUERN_ARM
#define FIRST_KERNELS(x86, arm) &arm
#else
#define FIRST_KERNELS(x86, arm) X86_KERNELS(x86)
#endif
#if QUERN_X86_WIDE
#define AVX512_KERNELS(kernels) &kernels
#else
#define AVX512_KERNELS(kernels) nullptr
#endif

}  // namespace quern
