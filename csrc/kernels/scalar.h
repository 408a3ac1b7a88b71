// The scalar versions, written to be read: the other instruction sets are judged by them.
#pragma once

#include "kernels/kernels.h"

namespace quern::scalar {

// Number `index` of an array, as float32.
float number(const void* data, Float type, int64_t index);

// Of a row and group, as float32.
float scale_of(const Weight& weight, int32_t row, int32_t group);

void quantize(const float* x, int32_t columns, int32_t group, float given, int8_t* values, float* scale, int32_t* sums);
void split(const int8_t* values, int64_t count, int8_t* even, int8_t* odd);
void rotate(float* values, int32_t columns, int32_t block, const uint8_t* signs);
void scales(const Weight& weight, int32_t row, int32_t first, int32_t count, float* out);
uint64_t read(const void* data, int64_t bytes);

void panel(const int8_t* panel, int32_t row_groups, int32_t blocks, const int8_t* x, int64_t stride, int32_t tokens,
           int32_t* sums);
void flush(const int32_t* sums, int32_t row_groups, int32_t tokens, const float* ws, const float* xs,
           const int32_t* xsum, int64_t token_stride, int32_t flip, float* out);
void minimums(const float* minimums, int32_t row_groups, int32_t tokens, int32_t groups, const float* xs,
              const int32_t* xsum, float* out);

}  // namespace quern::scalar
