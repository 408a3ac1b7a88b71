#include "engine/cache.h"

#include <sys/mman.h>

#include <cmath>
#include <cstring>
#include <new>

#include "kernels/kernels.h"

namespace quern {
namespace {

// Of one head's keys in a page, and as much again of its values.
int64_t half_bytes(const CacheLayer& layer, CachePrecision precision) {
  const int64_t codes = static_cast<int64_t>(precision) * layer.head_dim / 8;
  if (precision == CachePrecision::int8) return BLOCK * (codes + static_cast<int64_t>(sizeof(float)));
  if (precision == CachePrecision::int4) return BLOCK * (codes + static_cast<int64_t>(sizeof(uint16_t)) * code_groups(layer.head_dim));
  return BLOCK * codes;
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

void KeyValuePool::give(uint8_t* page) {
  const auto found = shared_.find(page);
  if (found == shared_.end())
    returned_.push_back(page);
  else if (--found->second == 0)
    shared_.erase(found);
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
  int32_t largest = 0;
  for (const CacheLayer& layer : shape_.layers) largest = layer.head_dim > largest ? layer.head_dim : largest;
  signs_.resize((largest + 7) / 8);
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

std::unique_ptr<SequenceCache> SequenceCache::fork(int32_t length) const {
  auto found = std::make_unique<SequenceCache>(pool_, wide());
  found->rotary_ = rotary_;
  for (int32_t block = 0; block < length / BLOCK; ++block) {
    const KeyValuePage& page = pages_[block];
    pool_->share(page.keys);
    if (wide()) pool_->share(page.values);
    found->pages_.push_back(page);
  }
  found->length_ = length / BLOCK * BLOCK;
  return found;
}

void SequenceCache::set_length(int32_t length) {
  if (length % BLOCK > 0 && pool_->shared(pages_[length / BLOCK].keys)) length = length / BLOCK * BLOCK;
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

void SequenceCache::transform(int32_t layer, float* heads, int32_t count) const {
  const int32_t size = shape_.layers[layer].head_dim;
  if (!integers() || !shape_.transformed) return;
  for (int32_t h = 0; h < count; ++h) kernels().rotate(heads + static_cast<int64_t>(h) * size, size, size & -size, signs_.data());
}

namespace {

// Where one head of one position goes: its keys lie BLOCK apart, for all positions of a page side by side.
struct HeadPlaces {
  uint8_t* keys;
  uint8_t* values;
  int64_t place;  // of the position in the page
  int32_t size;   // head_dim
};

// NaN where a number is not finite, so that what is read shows it.
float scale_of(const float* x, int32_t count) {
  float largest = 0.0f, check = 0.0f;
  for (int32_t i = 0; i < count; ++i) {
    largest = std::fabs(x[i]) > largest ? std::fabs(x[i]) : largest;
    check += x[i] * 0.0f;
  }
  return check == 0.0f ? largest / 127.0f : NAN;
}

int8_t code_of(float x, float scale) {
  if (!(scale > 0.0f)) return 0;
  const float code = std::nearbyint(x / scale);
  return static_cast<int8_t>(code > 127.0f ? 127.0f : code < -127.0f ? -127.0f : code);
}

void put_int8(const HeadPlaces& to, const float* key, const float* value) {
  const float key_scale = scale_of(key, to.size), value_scale = scale_of(value, to.size);
  reinterpret_cast<float*>(to.keys + BLOCK * to.size)[to.place] = key_scale;
  reinterpret_cast<float*>(to.values + BLOCK * to.size)[to.place] = value_scale;
  for (int32_t d = 0; d < to.size; ++d) {
    reinterpret_cast<int8_t*>(to.keys)[d * BLOCK + to.place] = code_of(key[d], key_scale);
    reinterpret_cast<int8_t*>(to.values)[to.place * to.size + d] = code_of(value[d], value_scale);
  }
}

constexpr uint16_t NOT_A_NUMBER = 0x7e00, INFINITE = 0x7c00, MAGNITUDE = 0x7fff;  // float16

// What the step of a group is tried with: parts of an eighth of the number that is farthest from zero.
constexpr float PARTS[] = {1.0f, 0.95f, 0.9f, 0.85f, 0.8f};
constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, ties to even

// The 4-bit number whose multiple of `scale` is nearest to x.
inline float nibble_of(float x, float scale) {
  const float rounded = (x / scale + MAGIC) - MAGIC;
  return rounded > 7.0f ? 7.0f : rounded < -8.0f ? -8.0f : rounded;
}

// Squared error of a group with a scale. Eight sums side by side, so that a compiler may use a vector for them.
float group_error(const float* x, int32_t count, float scale) {
  float sums[8] = {};
  int32_t i = 0;
  const auto add = [&](float& sum, float number) {
    const float error = number - nibble_of(number, scale) * scale;
    sum += error * error;
  };
  for (; i + 8 <= count; i += 8)
    for (int32_t j = 0; j < 8; ++j) add(sums[j], x[i + j]);
  for (; i < count; ++i) add(sums[i % 8], x[i]);
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

// A group of `count` numbers as 4-bit codes, `step` bytes apart, with the scale of `PARTS` that leaves the least squared error;
// the number that is farthest from zero is on the side of -8, which has one step more. Returns the scale, float16; NaN where a
// number is not finite, infinity where it is too large.
uint16_t pack_group(const Operations& operations, const float* x, int32_t count, uint8_t* codes, int64_t step) {
  float farthest = 0.0f, check = 0.0f;
  for (int32_t i = 0; i < count; ++i) {
    farthest = std::fabs(x[i]) > std::fabs(farthest) ? x[i] : farthest;
    check += x[i] * 0.0f;
  }
  constexpr int32_t parts = sizeof(PARTS) / sizeof(PARTS[0]);
  float scales[parts];
  uint16_t stored[parts];
  for (int32_t i = 0; i < parts; ++i) scales[i] = PARTS[i] * (farthest / -8.0f);
  operations.to_float16(scales, stored, parts);
  operations.from_float16(stored, scales, parts);
  const bool finite = check == 0.0f, large = (stored[0] & MAGNITUDE) == INFINITE;  // a NaN is equal to nothing
  if (!finite || large || scales[parts - 1] == 0.0f) {
    for (int32_t i = 0; i < count / 2; ++i) codes[i * step] = 0x88;  // zeros
    return !finite ? NOT_A_NUMBER : large ? INFINITE : 0;
  }
  int32_t best = 0;
  float least = INFINITY;
  for (int32_t i = 0; i < parts; ++i)
    if (const float error = group_error(x, count, scales[i]); error < least) {
      least = error;
      best = i;
    }
  const auto code = [&](float number) { return static_cast<int32_t>(nibble_of(number, scales[best])) + 8; };
  for (int32_t i = 0; i < count / 2; ++i) codes[i * step] = static_cast<uint8_t>(code(x[i]) | code(x[i + count / 2]) << 4);
  return stored[best];
}

// Whether a scale overflowed.
bool put_int4(const Operations& operations, const HeadPlaces& to, const float* key, const float* value) {
  const int32_t groups = code_groups(to.size), bytes = to.size / 2;
  uint16_t* key_scales = reinterpret_cast<uint16_t*>(to.keys + BLOCK * bytes);
  uint16_t* value_scales = reinterpret_cast<uint16_t*>(to.values + BLOCK * bytes);
  bool overflow = false;
  for (int32_t g = 0; g < groups; ++g) {
    const int32_t from = g * CODE_GROUP, count = to.size - from < CODE_GROUP ? to.size - from : CODE_GROUP;
    const uint16_t a = pack_group(operations, key + from, count, to.keys + from / 2 * BLOCK + to.place, BLOCK);
    const uint16_t b = pack_group(operations, value + from, count, to.values + to.place * bytes + from / 2, 1);
    key_scales[g * BLOCK + to.place] = a;
    value_scales[to.place * groups + g] = b;
    overflow |= (a & MAGNITUDE) == INFINITE || (b & MAGNITUDE) == INFINITE;
  }
  return overflow;
}

// Whether one of some float16 numbers is an infinity.
bool any_infinite(const uint16_t* x, int32_t count) {
  uint32_t found = 0;
  for (int32_t i = 0; i < count; ++i) found |= (x[i] & MAGNITUDE) == INFINITE;
  return found != 0;
}

// Whether a number overflowed.
bool put_float16(const Operations& operations, const HeadPlaces& to, const float* key, const float* value) {
  uint16_t half[BLOCK];
  bool overflow = false;
  for (int32_t d = 0; d < to.size; d += BLOCK) {
    const int32_t here = to.size - d < BLOCK ? to.size - d : BLOCK;
    operations.to_float16(key + d, half, here);
    overflow |= any_infinite(half, here);
    for (int32_t i = 0; i < here; ++i) reinterpret_cast<uint16_t*>(to.keys)[(d + i) * BLOCK + to.place] = half[i];
  }
  uint16_t* values = reinterpret_cast<uint16_t*>(to.values) + to.place * to.size;
  operations.to_float16(value, values, to.size);
  return any_infinite(values, to.size) || overflow;
}

void put_float32(const HeadPlaces& to, const float* key, const float* value) {
  for (int32_t d = 0; d < to.size; ++d) reinterpret_cast<float*>(to.keys)[d * BLOCK + to.place] = key[d];
  memcpy(reinterpret_cast<float*>(to.values) + to.place * to.size, value, sizeof(float) * to.size);
}

}  // namespace

void SequenceCache::put(const Operations& operations, int32_t layer, int32_t position, float* keys, float* values) {
  const int32_t size = shape_.layers[layer].head_dim, heads = shape_.layers[layer].heads;
  const HeadPlace& head = places_[layer];
  const KeyValuePage& page = pages_[position / BLOCK];
  transform(layer, keys, heads);
  transform(layer, values, heads);
  bool overflow = false;
  for (int32_t h = 0; h < heads; ++h) {
    const int64_t at = head.first + h * head.step;
    const HeadPlaces to{page.keys + at, page.values + at + head.values, position % BLOCK, size};
    const float* key = keys + static_cast<int64_t>(h) * size;
    const float* value = values + static_cast<int64_t>(h) * size;
    switch (shape_.precision) {
      case CachePrecision::int4: overflow |= put_int4(operations, to, key, value); break;
      case CachePrecision::int8: put_int8(to, key, value); break;
      case CachePrecision::float16: overflow |= put_float16(operations, to, key, value); break;
      case CachePrecision::float32: put_float32(to, key, value); break;
    }
  }
  if (overflow) overflowed_.store(true, std::memory_order_relaxed);
}

HeadCache SequenceCache::head(int32_t layer, int32_t head) const {
  HeadCache view{};
  view.head_dim = view.depth = shape_.layers[layer].head_dim;
  view.precision = shape_.precision;
  view.pages = pages_.data();
  view.keys_at = places_[layer].first + head * places_[layer].step;
  view.values_at = view.keys_at + places_[layer].values;
  return view;
}

}  // namespace quern
