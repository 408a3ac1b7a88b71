#include "engine/rotary.h"

#include <algorithm>
#include <cmath>

#include "engine/operations.h"

namespace quern {

Rotary::Rotary(RotaryShape shape)
    : shape_(std::move(shape)),
      half_(static_cast<int32_t>(shape_.frequencies[0].size())),
      tables_(shape_.frequencies.size()) {}

int32_t Rotary::clamped(int32_t set) const { return std::min(set, static_cast<int32_t>(tables_.size()) - 1); }

void Rotary::extend(int32_t set, int32_t positions) {
  set = clamped(set);
  const std::vector<float>& frequencies = shape_.frequencies[set];
  RotaryTable& table = tables_[set];
  const int64_t blocks = (positions + BLOCK - 1) / BLOCK, before = table.cosines.size() / (half_ * BLOCK);
  if (blocks <= before) return;
  const int64_t after = std::max(blocks, 2 * before);
  table.cosines.resize(after * half_ * BLOCK);
  table.sines.resize(after * half_ * BLOCK);
  for (int64_t b = before; b < after; ++b)
    for (int32_t d = 0; d < half_; ++d)
      for (int32_t p = 0; p < BLOCK; ++p) {
        const float angle = static_cast<float>(b * BLOCK + p) * frequencies[d];
        const int64_t place = (b * half_ + d) * BLOCK + p;
        table.cosines[place] = std::cos(angle) * shape_.factor;
        table.sines[place] = std::sin(angle) * shape_.factor;
      }
}

void Rotary::rotate(int32_t set, float* heads, int32_t count, int32_t position, float scale) const {
  const RotaryTable& table = tables_[clamped(set)];
  const int64_t place = static_cast<int64_t>(position / BLOCK) * half_ * BLOCK + position % BLOCK;
  for (int32_t h = 0; h < count; ++h) {
    float* head = heads + static_cast<int64_t>(h) * 2 * half_;
    for (int32_t d = 0; d < half_; ++d) {
      const float c = table.cosines[place + d * BLOCK] * scale, s = table.sines[place + d * BLOCK] * scale;
      const float x = head[d], y = head[d + half_];
      head[d] = x * c - y * s;
      head[d + half_] = y * c + x * s;
    }
  }
}

}  // namespace quern
