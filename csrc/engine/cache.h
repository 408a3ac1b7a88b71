// Keys and values of sequences, for all layers, in pages of one pool.
//
// A page holds BLOCK positions of all layers; a sequence has a list of pages, which grows with it. Of each layer and head a page
// has the keys and after them the values, so attention reads it from front to back.
//
// Keys are stored rotated by position. Those of integer precisions are stored without the projection's bias: large biases (Qwen's)
// are constants that would use up the bits. Where keys are normed, the bias is no constant any more: they are stored with it,
// after the norm. The bias b of a key at position p adds R_p q . R_p b to its score, R_p being the rotation: a sum of cosines and
// sines of the position, multiplied by what query and bias alone decide. Attention takes it as further channels
// (HeadCache::depth), and so keys need no work but widening.
//
// Integer keys go through an orthonormal Hadamard transform, which spreads what single channels stand out by over all of them
// (Ashkboos et al. 2024, arXiv 2404.00456). Queries go through the same transform, so scores are what they would be without it;
// values too, and attention's outputs back. int8 has one scale for each head and position, int4 one for CODE_GROUP channels.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "engine/operations.h"

namespace quern {

// Keys and values that a layer keeps of one position.
struct CacheLayer {
  int32_t heads, head_dim;
};

struct CacheShape {
  std::vector<CacheLayer> layers;
  CachePrecision precision;
  bool transformed = true;  // integers: through the Hadamard transform; without it only to see what it gains
};

class KeyValuePool {
 public:
  // Throws std::bad_alloc where the system does not give the memory. It is touched as pages fill up.
  KeyValuePool(const CacheShape& shape, int64_t pages);
  ~KeyValuePool();
  KeyValuePool(const KeyValuePool&) = delete;
  KeyValuePool& operator=(const KeyValuePool&) = delete;

  static int64_t page_bytes(const CacheShape& shape);

  const CacheShape& shape() const { return shape_; }
  int64_t pages() const { return pages_; }
  int64_t free_pages() const { return pages_ - fresh_ + static_cast<int64_t>(returned_.size()); }

  // One of the free pages, of which there must be one; those last returned first, since they are in memory.
  uint8_t* take();
  void give(uint8_t* page);  // by one of those that have it; it is free when the last one gives it
  // One more sequence has the page, which from here on nobody may write to.
  void share(uint8_t* page) { ++shared_[page]; }
  bool shared(uint8_t* page) const { return shared_.count(page) > 0; }

  int32_t sequences() const { return sequences_; }
  void opened() { ++sequences_; }
  void closed();  // with the last sequence the pool's memory goes back to the system

 private:
  CacheShape shape_;
  int64_t pages_, page_bytes_, fresh_ = 0;  // fresh: pages that were taken at least once
  std::vector<uint8_t*> returned_;
  std::unordered_map<uint8_t*, int32_t> shared_;  // how many have a page beside the first
  int32_t sequences_ = 0;
  size_t mapped_ = 0;
  uint8_t* mapping_ = nullptr;
};

// One sequence. Not for several threads at once, and not while the decoder is being fed with it.
class SequenceCache {
 public:
  // `wide`: as float32 in a pool of float16 pages, two for BLOCK positions: one for keys and one for values.
  SequenceCache(std::shared_ptr<KeyValuePool> pool, bool wide);
  ~SequenceCache();
  SequenceCache(const SequenceCache&) = delete;
  SequenceCache& operator=(const SequenceCache&) = delete;

  const CacheShape& shape() const { return shape_; }
  bool wide() const { return each_ == 2; }
  // Whether keys are stored without their bias, and keys and values transformed.
  bool integers() const { return shape_.precision == CachePrecision::int4 || shape_.precision == CachePrecision::int8; }
  // Numbers that a score with a head of the layer is a sum of; `biased`: its keys have a bias.
  int32_t depth(int32_t layer, bool biased) const {
    return (biased && integers() ? 2 : 1) * shape_.layers[layer].head_dim;
  }
  // The Hadamard transform of heads (count, head_dim) of a layer, in place, in blocks of the largest power of two that divides
  // head_dim; its own inverse. Nothing where the cache has none.
  void transform(int32_t layer, float* heads, int32_t count) const;

  // Another sequence that begins with the first `length` positions of this one, as far as they fill whole pages, which both
  // then have.
  std::unique_ptr<SequenceCache> fork(int32_t length) const;

  // Positions that are filled. Setting it returns all pages behind it; what remains ends in front of a page that others have
  // too, where it would end inside of it, so that nobody writes there.
  int32_t length() const { return length_; }
  void set_length(int32_t length);
  void filled(int32_t length) { length_ = length > length_ ? length : length_; }

  // Take pages for `length` positions; false, and nothing is taken, where the pool has not enough.
  bool reserve(int64_t length);
  // Positions that there is room for, in pages of its own and free ones.
  int64_t room() const;

  // Which of the decoder's sets of rotary frequencies the sequence goes by.
  int32_t rotary() const { return rotary_; }
  void set_rotary(int32_t rotary) { rotary_ = rotary; }

  // Whether a finite key or value was too large for float16 (for int4: its scale was), so that infinity was stored.
  bool overflowed() const { return overflowed_.load(std::memory_order_relaxed); }

  // Keys and values of one position: (heads, head_dim) each; keys rotated. They may be overwritten.
  void put(const Operations& operations, int32_t layer, int32_t position, float* keys, float* values);

  // Without the rotation tables, which belong to the model.
  HeadCache head(int32_t layer, int32_t head) const;

 private:
  // In a page, bytes: where a layer begins, from one head to the next, from a head's keys to its values.
  struct HeadPlace {
    int64_t first, step, values;
  };

  void release(size_t blocks);

  std::shared_ptr<KeyValuePool> pool_;
  CacheShape shape_;
  int32_t each_;  // pages for BLOCK positions
  std::vector<HeadPlace> places_;  // by layer
  std::vector<uint8_t> signs_;     // of the transform: none are negative
  std::vector<KeyValuePage> pages_;
  int32_t length_ = 0, rotary_ = 0;
  std::atomic<bool> overflowed_{false};
};

}  // namespace quern
