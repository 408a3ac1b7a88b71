// A loaded run file, and texts that it continues.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "engine/decoder.h"
#include "program/reader.h"
#include "run/seeds.h"
#include "run/tokenizer.h"

namespace quern {

// A file in memory, read-only and shared with whoever maps it too.
class MappedFile {
 public:
  // Throws BadFile where it cannot be read.
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const uint8_t* data() const { return data_; }
  uint64_t size() const { return size_; }

 private:
  const uint8_t* data_ = nullptr;
  uint64_t size_ = 0;
};

class Model {
 public:
  // `threads` 0: as many as the process may use. Throws BadFile with the path in its text.
  Model(const std::string& path, int threads);

  Decoder& decoder() const { return *program_.decoder; }
  const ModelFacts& facts() const { return program_.facts; }
  const Tokenizer& tokenizer() const { return tokenizer_; }
  int32_t vocabulary() const { return decoder().shape().vocabulary; }
  uint64_t file_bytes() const { return file_.size(); }

 private:
  MappedFile file_;
  ReadProgram program_;
  Tokenizer tokenizer_;
};

struct Sampling {
  double temperature = 0.0;
  int32_t top_k = 0;
  double top_p = 1.0;
};

// Keys and values that a text's cache was too narrow for, where the caller chose it.
struct TooNarrow : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// One text. The logits are always those of the whole text in one pass.
class Session {
 public:
  // `context`: most tokens; 0: the model's, or as many as free memory has room for. `cache`: float16 where it is empty, and then
  // float32 for a text whose keys or values that cannot hold. Throws std::invalid_argument, and std::bad_alloc.
  Session(std::shared_ptr<Model> model, int32_t context, const std::string& cache);

  int32_t length() const { return static_cast<int32_t>(ids_.size()); }
  int32_t context() const { return context_; }
  int64_t bytes_per_token() const;
  bool wide() const { return cache_->wide(); }

  // Append tokens. Where it throws (std::invalid_argument for tokens that do not fit), none were.
  void feed(const int32_t* tokens, int64_t count);
  // Forget all but the first `length` tokens, behind which the logits are unknown until the next feed.
  void rewind(int32_t length);
  // Of the last token: (vocabulary); empty before the first.
  const std::vector<float>& logits() const { return logits_; }

  void seed(uint64_t seed) { draw_ = Draw(seed); }
  // The next token. Throws std::invalid_argument for options out of range, std::runtime_error for logits that are no numbers.
  int32_t sample(const Sampling& sampling);

 private:
  void append(const int32_t* tokens, int64_t count);
  void restart(bool wide);
  void compute(const std::vector<int32_t>& pending);

  std::shared_ptr<Model> model_;
  bool chosen_;
  std::shared_ptr<KeyValuePool> pool_;
  std::unique_ptr<SequenceCache> cache_;
  int32_t context_;
  std::vector<int32_t> ids_;
  std::vector<float> logits_;
  Draw draw_{0};
};

}  // namespace quern
