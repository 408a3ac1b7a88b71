// Which instruction sets a build has tables for beside the scalar ones: those that CMakeLists.txt says (QUERN_ISAS), where the
// processor is of their family. Results are the same with any of them.
#pragma once

// quern-run is to be small: of a kernel's variants for few tokens it has the one for one token.
#if defined(QUERN_SMALL)
constexpr bool SMALL_CODE = true;
#else
constexpr bool SMALL_CODE = false;
#endif

#if defined(__x86_64__) && defined(QUERN_AVX2)
#define QUERN_X86 1
#else
#define QUERN_X86 0
#endif

#if defined(__aarch64__) && defined(QUERN_NEON) && defined(QUERN_I8MM)
#define QUERN_ARM 1
#else
#define QUERN_ARM 0
#endif

#if QUERN_X86 && defined(QUERN_AVX512) && defined(QUERN_AMX)
#define QUERN_X86_WIDE 1
#else
#define QUERN_X86_WIDE 0
#endif
