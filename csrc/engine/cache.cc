#include "engine/cache.h"

#include <sys/mman.h>

#include <cmath>
#include <cstring>
#include <new>

namespace quern {

int64_t cache_bytes_per_position(const CacheShape& shape) {
  const int64_t scale = shape.precision == CachePrecision::int8 ? sizeof(float) : 0;
  const int64_t head = static_cast<int64_t>(shape.precision) * shape.head_dim + scale;
  return 2 * head * shape.layers * shape.heads;
}

KeyValueCache::KeyValueCache(const CacheShape& shape) : shape_(shape) {
  element_ = static_cast<int64_t>(shape.precision);
  head_bytes_ = element_ * shape.capacity * shape.head_dim;
  head_scales_ = shape.precision == CachePrecision::int8 ? shape.capacity : 0;
  const int64_t heads = static_cast<int64_t>(shape.layers) * shape.heads;
  mapped_ = static_cast<size_t>(2 * heads * (head_bytes_ + head_scales_ * static_cast<int64_t>(sizeof(float))));
  // Mapped rather than allocated: untouched positions cost nothing, and everything starts as zero.
  mapping_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping_ == MAP_FAILED) throw std::bad_alloc();
  keys_ = static_cast<uint8_t*>(mapping_);
  values_ = keys_ + heads * head_bytes_;
  scales_ = reinterpret_cast<float*>(values_ + heads * head_bytes_);
}

KeyValueCache::~KeyValueCache() { munmap(mapping_, mapped_); }

namespace {

float scale_of(const float* x, int32_t count) {
  float largest = 0.0f;
  for (int32_t i = 0; i < count; ++i) largest = std::fabs(x[i]) > largest ? std::fabs(x[i]) : largest;
  return largest / 127.0f;
}

int8_t code_of(float x, float scale) {
  if (!(scale > 0.0f)) return 0;
  const float code = std::nearbyint(x / scale);
  return static_cast<int8_t>(code > 127.0f ? 127.0f : code < -127.0f ? -127.0f : code == code ? code : 0.0f);
}

// Whether one of some float16 numbers is an infinity.
bool any_infinite(const uint16_t* x, int32_t count) {
  uint32_t found = 0;
  for (int32_t i = 0; i < count; ++i) found |= (x[i] & 0x7fffu) == 0x7c00u;
  return found != 0;
}

}  // namespace

void KeyValueCache::put(const Operations& operations, int32_t layer, int32_t position, const float* keys,
                        const float* values) {
  const int32_t size = shape_.head_dim;
  const int64_t block = position / BLOCK, place = position % BLOCK;
  bool overflow = false;
  for (int32_t h = 0; h < shape_.heads; ++h) {
    const int64_t head = static_cast<int64_t>(layer) * shape_.heads + h;
    const float* key = keys + static_cast<int64_t>(h) * size;
    const float* value = values + static_cast<int64_t>(h) * size;
    uint8_t* key_to = keys_ + head * head_bytes_ + block * size * BLOCK * element_;
    uint8_t* value_to = values_ + head * head_bytes_ + static_cast<int64_t>(position) * size * element_;
    if (shape_.precision == CachePrecision::int8) {
      float* scales = scales_ + 2 * head * head_scales_;
      const float key_scale = scale_of(key, size), value_scale = scale_of(value, size);
      scales[position] = key_scale;
      scales[head_scales_ + position] = value_scale;
      for (int32_t d = 0; d < size; ++d) {
        reinterpret_cast<int8_t*>(key_to)[d * BLOCK + place] = code_of(key[d], key_scale);
        reinterpret_cast<int8_t*>(value_to)[d] = code_of(value[d], value_scale);
      }
    } else if (shape_.precision == CachePrecision::float32) {
      for (int32_t d = 0; d < size; ++d) reinterpret_cast<float*>(key_to)[d * BLOCK + place] = key[d];
      memcpy(value_to, value, sizeof(float) * size);
    } else {
      uint16_t half[BLOCK];
      for (int32_t d = 0; d < size; d += BLOCK) {
        const int32_t here = size - d < BLOCK ? size - d : BLOCK;
        operations.to_float16(key + d, half, here);
        overflow |= any_infinite(half, here);
        for (int32_t i = 0; i < here; ++i) reinterpret_cast<uint16_t*>(key_to)[(d + i) * BLOCK + place] = half[i];
      }
      operations.to_float16(value, reinterpret_cast<uint16_t*>(value_to), size);
      overflow |= any_infinite(reinterpret_cast<const uint16_t*>(value_to), size);
    }
  }
  if (overflow) overflowed_.store(true, std::memory_order_relaxed);
}

HeadCache KeyValueCache::head(int32_t layer, int32_t head) const {
  const int64_t index = static_cast<int64_t>(layer) * shape_.heads + head;
  HeadCache view{};
  view.head_dim = shape_.head_dim;
  view.precision = shape_.precision;
  view.keys = keys_ + index * head_bytes_;
  view.values = values_ + index * head_bytes_;
  if (shape_.precision == CachePrecision::int8) {
    view.key_scale = scales_ + 2 * index * head_scales_;
    view.value_scale = view.key_scale + head_scales_;
  }
  return view;
}

}  // namespace quern
