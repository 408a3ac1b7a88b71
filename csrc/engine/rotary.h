// Rotation of heads by position (Su et al. 2021, arXiv 2104.09864): tables that grow with the longest text.
#pragma once

#include <cstdint>
#include <vector>

namespace quern {

struct RotaryShape {
  // Sets of (head_dim / 2,): angle of a position = position * frequency. A sequence says by which set it goes; the last one
  // serves where there are fewer.
  std::vector<std::vector<float>> frequencies;
  float factor;  // cosines and sines are multiplied by it (1 but for some scaling variants)
};

// (positions / BLOCK, head_dim / 2, BLOCK), as attention reads them where keys have a bias apart.
struct RotaryTable {
  std::vector<float> cosines, sines;
};

class Rotary {
 public:
  explicit Rotary(RotaryShape shape);

  int32_t head_dim() const { return 2 * half_; }
  // For `positions` positions. Tables move in memory.
  void extend(int32_t set, int32_t positions);
  const RotaryTable& table(int32_t set) const { return tables_[clamped(set)]; }
  // Heads (count, head_dim) at a position, in place and multiplied by `scale`.
  void rotate(int32_t set, float* heads, int32_t count, int32_t position, float scale) const;

 private:
  int32_t clamped(int32_t set) const;

  RotaryShape shape_;
  int32_t half_;
  std::vector<RotaryTable> tables_;
};

}  // namespace quern
