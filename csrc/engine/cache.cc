#include "engine/cache.h"

#include <sys/mman.h>

#include <cmath>
#include <cstring>
#include <new>

namespace quern {
namespace {

// Of one head's keys in a page, and as much again of its values.
int64_t half_bytes(const CacheLayer& layer, CachePrecision precision) {
  const int64_t scales = precision == CachePrecision::int8 ? sizeof(float) : 0;
  return BLOCK * (static_cast<int64_t>(precision) * layer.head_dim + scales);
}

}  // namespace

int64_t KeyValuePool::page_bytes(const CacheShape& shape) {
  int64_t bytes = 0;
  for (const CacheLayer& layer : shape.layers) bytes += 2 * half_bytes(layer, shape.precision) * layer.heads;
  return bytes;
}

KeyValuePool::KeyValuePool(const CacheShape& shape, int64_t pages)
    : shape_(shape), pages_(pages), page_bytes_(page_bytes(shape)) {
  if (pages > INT64_MAX / page_bytes_) throw std::bad_alloc();
  mapped_ = static_cast<size_t>(pages * page_bytes_);
  // Mapped rather than allocated: untouched pages cost nothing.
  void* mapping = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  mapping_ = static_cast<uint8_t*>(mapping);
}

KeyValuePool::~KeyValuePool() { munmap(mapping_, mapped_); }

uint8_t* KeyValuePool::take() {
  if (returned_.empty()) return mapping_ + page_bytes_ * fresh_++;
  uint8_t* page = returned_.back();
  returned_.pop_back();
  return page;
}

void KeyValuePool::closed() {
  if (--sequences_ > 0) return;
  madvise(mapping_, mapped_, MADV_DONTNEED);
  returned_.clear();
  fresh_ = 0;
}

SequenceCache::SequenceCache(std::shared_ptr<KeyValuePool> pool, bool wide)
    : pool_(std::move(pool)), shape_(pool_->shape()), each_(wide ? 2 : 1) {
  int64_t first = 0;
  for (const CacheLayer& layer : shape_.layers) {
    const int64_t half = half_bytes(layer, shape_.precision);
    places_.push_back({first, 2 * half, wide ? 0 : half});
    first += 2 * half * layer.heads;
  }
  if (wide) shape_.precision = CachePrecision::float32;
  element_ = static_cast<int64_t>(shape_.precision);
  pool_->opened();
}

SequenceCache::~SequenceCache() {
  release(0);
  pool_->closed();
}

void SequenceCache::release(size_t blocks) {
  while (pages_.size() > blocks) {
    if (each_ == 2) pool_->give(pages_.back().values);
    pool_->give(pages_.back().keys);
    pages_.pop_back();
  }
}

void SequenceCache::set_length(int32_t length) {
  length_ = length;
  release((static_cast<size_t>(length) + BLOCK - 1) / BLOCK);
}

bool SequenceCache::reserve(int64_t length) {
  const int64_t missing = (length + BLOCK - 1) / BLOCK - static_cast<int64_t>(pages_.size());
  if (missing * each_ > pool_->free_pages()) return false;
  for (int64_t i = 0; i < missing; ++i) {
    uint8_t* const keys = pool_->take();
    pages_.push_back({keys, each_ == 2 ? pool_->take() : keys});
  }
  return true;
}

int64_t SequenceCache::room() const {
  return (static_cast<int64_t>(pages_.size()) + pool_->free_pages() / each_) * BLOCK;
}

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

void SequenceCache::put(const Operations& operations, int32_t layer, int32_t position, const float* keys,
                        const float* values) {
  const int32_t size = shape_.layers[layer].head_dim;
  const HeadPlace& head = places_[layer];
  const int64_t place = position % BLOCK;
  const KeyValuePage& page = pages_[position / BLOCK];
  bool overflow = false;
  for (int32_t h = 0; h < shape_.layers[layer].heads; ++h) {
    const int64_t at = head.first + h * head.step;
    const float* key = keys + static_cast<int64_t>(h) * size;
    const float* value = values + static_cast<int64_t>(h) * size;
    uint8_t* key_to = page.keys + at;
    uint8_t* value_block = page.values + at + head.values;
    uint8_t* value_to = value_block + place * size * element_;
    if (shape_.precision == CachePrecision::int8) {
      const float key_scale = scale_of(key, size), value_scale = scale_of(value, size);
      reinterpret_cast<float*>(key_to + BLOCK * size)[place] = key_scale;
      reinterpret_cast<float*>(value_block + BLOCK * size)[place] = value_scale;
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

HeadCache SequenceCache::head(int32_t layer, int32_t head) const {
  HeadCache view{};
  view.head_dim = shape_.layers[layer].head_dim;
  view.precision = shape_.precision;
  view.pages = pages_.data();
  view.keys_at = places_[layer].first + head * places_[layer].step;
  view.values_at = view.keys_at + places_[layer].values;
  return view;
}

}  // namespace quern
