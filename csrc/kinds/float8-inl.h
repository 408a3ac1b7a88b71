// What all files of 8-bit floating-point numbers share, with internal linkage; see kernels/common_avx512.h.
#pragma once

namespace quern {
namespace {

enum class Float8 { e4m3, e5m2 };

// Kernels put the bits of an e4m3 number where those of a float16 lie, where it means so many times less.
template <Float8 TYPE>
constexpr float UNIT = TYPE == Float8::e4m3 ? 256.0f : 1.0f;

}  // namespace
}  // namespace quern
