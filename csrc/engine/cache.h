// Keys and values of one sequence, for all layers.
//
// Floating-point keys are stored rotated. int8 keys are stored before the projection's bias and before rotation, with one scale
// for each head and position: large biases (Qwen's key projections) are constants that would use up the eight bits, and
// rotation would spread them over positions. Attention adds and rotates when it reads. Where keys are normed, the bias is no
// constant any more: they are stored with it, after the norm.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "engine/operations.h"

namespace quern {

struct CacheShape {
  int32_t layers, heads, head_dim;
  int32_t capacity;  // positions, a multiple of BLOCK
  CachePrecision precision;

  bool bare_keys() const { return precision == CachePrecision::int8; }
};

// Bytes that one position takes.
int64_t cache_bytes_per_position(const CacheShape& shape);

class KeyValueCache {
 public:
  // Throws std::bad_alloc where the system does not give the memory. Pages are touched as positions fill up.
  explicit KeyValueCache(const CacheShape& shape);
  ~KeyValueCache();
  KeyValueCache(const KeyValueCache&) = delete;
  KeyValueCache& operator=(const KeyValueCache&) = delete;

  const CacheShape& shape() const { return shape_; }
  int32_t length() const { return length_; }
  void set_length(int32_t length) { length_ = length; }

  // Which of the decoder's sets of rotary frequencies the sequence goes by.
  int32_t rotary() const { return rotary_; }
  void set_rotary(int32_t rotary) { rotary_ = rotary; }

  // Whether a finite key or value was too large for float16, so that infinity was stored.
  bool overflowed() const { return overflowed_.load(std::memory_order_relaxed); }

  // Keys and values of one position: (heads, head_dim) each; keys rotated, or bare for int8.
  void put(const Operations& operations, int32_t layer, int32_t position, const float* keys, const float* values);

  // Without the bias and the rotation tables, which belong to the model.
  HeadCache head(int32_t layer, int32_t head) const;

 private:
  CacheShape shape_;
  int32_t length_ = 0, rotary_ = 0;
  std::atomic<bool> overflowed_{false};
  int64_t element_, head_bytes_, head_scales_;
  uint8_t* keys_ = nullptr;
  uint8_t* values_ = nullptr;
  float* scales_ = nullptr;
  size_t mapped_ = 0;
  void* mapping_ = nullptr;
};

}  // namespace quern
