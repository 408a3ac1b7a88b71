#include "run/model.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "engine/reading.h"
#include "engine/sampling.h"

namespace quern {
namespace {

constexpr double SPARE = 0.9;  // share of the free memory that a context may plan with

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

CachePrecision precision_of(const std::string& name) {
  if (name.empty() || name == "float16") return CachePrecision::float16;
  if (name == "int4") return CachePrecision::int4;
  if (name == "int8") return CachePrecision::int8;
  if (name == "float32") return CachePrecision::float32;
  throw std::invalid_argument("cache '" + name + "' is not known; give one of float32, float16, int8, int4");
}

// Bytes that the system could give; as many as anybody may ask for where it does not say.
int64_t free_memory() {
  long long kib = INT64_MAX / 1024;
  if (std::FILE* file = std::fopen("/proc/meminfo", "r")) {
    char line[256];
    while (std::fgets(line, sizeof line, file) != nullptr)
      if (std::sscanf(line, "MemAvailable: %lld kB", &kib) == 1) break;
    std::fclose(file);
  }
  return kib * 1024;
}

int64_t pages_for(int64_t tokens) { return (tokens + BLOCK - 1) / BLOCK; }

ReadProgram read(const MappedFile& file, const std::string& path, int threads) {
  try {
    return read_program(file.data(), file.size(), threads);
  } catch (const std::bad_alloc&) {
    throw BadFile(path + " asks for more memory than there is");
  } catch (const std::exception& error) {
    throw BadFile(path + " cannot be used: " + error.what() +
                  ". Copy the file again, or make one with quern export MODEL --format run -o NAME.run");
  }
}

Tokenizer tokenizer_of(const ReadProgram& program, const std::string& path) {
  try {
    return Tokenizer(program.tokenizer);
  } catch (const BadFile& error) {
    throw BadFile(path + " cannot be used: " + error.what() + ". Copy the file again");
  }
}

}  // namespace

MappedFile::MappedFile(const std::string& path) {
  const auto refuse = [&](const std::string& reason) -> BadFile { return BadFile(path + " cannot be read: " + reason); };
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file < 0) throw refuse(std::strerror(errno));
  struct stat status;
  const bool known = fstat(file, &status) == 0;
  const bool folder = known && S_ISDIR(status.st_mode), regular = known && S_ISREG(status.st_mode);
  if (regular && status.st_size > 0) {
    void* mapping = mmap(nullptr, static_cast<size_t>(status.st_size), PROT_READ, MAP_SHARED, file, 0);
    if (mapping != MAP_FAILED) {
      data_ = static_cast<const uint8_t*>(mapping);
      size_ = static_cast<uint64_t>(status.st_size);
#if defined(MADV_HUGEPAGE)
      madvise(mapping, size_, MADV_HUGEPAGE);  // looking up small pages takes up to a fifth of the time; refused where there are none
#endif
    }
  }
  close(file);
  if (folder) throw refuse("it is a folder. Make a run file of the model: quern export " + path + " --format run -o NAME.run");
  if (!regular) throw refuse("it is not a regular file");
  if (status.st_size == 0) throw refuse("it is empty");
  if (data_ == nullptr) throw refuse("the system does not map it into memory");
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) munmap(const_cast<uint8_t*>(data_), size_);
}

Model::Model(const std::string& path, int threads)
    : file_(path), program_(read(file_, path, threads)), tokenizer_(tokenizer_of(program_, path)) {}

Session::Session(std::shared_ptr<Model> model, int32_t context, const std::string& cache)
    : model_(std::move(model)), chosen_(!cache.empty()), context_(context > 0 ? context : model_->facts().context) {
  const int32_t most = model_->facts().context;
  require(context >= 0, "the context is " + std::to_string(context) + "; give how many tokens it may have, or 0 for the model's");
  require(context <= most, std::to_string(context) + " tokens do not fit: this model's context is " + std::to_string(most));
  const CacheShape shape{model_->decoder().shape().layers, precision_of(cache)};
  const int64_t page = KeyValuePool::page_bytes(shape);
  if (context == 0) {
    const int64_t fitting = static_cast<int64_t>(SPARE * static_cast<double>(free_memory())) / page * BLOCK;
    if (fitting < BLOCK) throw std::bad_alloc();
    context_ = static_cast<int32_t>(std::min<int64_t>(most, fitting));
  }
  // Room for a text that must be kept as float32; pages cost memory when they are filled.
  const int32_t each = chosen_ ? 1 : 2;
  pool_ = std::make_shared<KeyValuePool>(shape, each * pages_for(context_));
  cache_ = std::make_unique<SequenceCache>(pool_, false);
}

int64_t Session::bytes_per_token() const { return KeyValuePool::page_bytes(pool_->shape()) / BLOCK; }

void Session::feed(const int32_t* tokens, int64_t count) {
  require(count > 0, "there are no tokens to feed");
  require(count <= context_ - length(), std::to_string(length() + count) + " tokens do not fit: the context has room for " +
                                            std::to_string(context_) + ". Shorten the text, or give a longer context");
  try {
    append(tokens, count);
  } catch (...) {
    cache_->set_length(std::min(length(), cache_->length()));
    throw;
  }
  ids_.insert(ids_.end(), tokens, tokens + count);
}

void Session::append(const int32_t* tokens, int64_t count) {
  const int32_t switched = model_->facts().switch_length, rotary = switched > 0 && length() + count > switched ? 1 : 0;
  if (rotary != cache_->rotary()) {
    cache_->set_length(0);
    cache_->set_rotary(rotary);
  }
  std::vector<int32_t> pending(ids_.begin() + cache_->length(), ids_.end());
  pending.insert(pending.end(), tokens, tokens + count);
  compute(pending);
  if (!cache_->overflowed()) return;
  if (chosen_) {
    const std::string most = cache_->shape().precision == CachePrecision::int4 ? "524032" : "65504";
    restart(false);
    throw TooNarrow("keys or values exceed " + most + ", the greatest number of this key/value cache. Choose float32 or int8, or none");
  }
  restart(true);
  cache_->set_rotary(rotary);
  pending = ids_;
  pending.insert(pending.end(), tokens, tokens + count);
  compute(pending);
}

void Session::restart(bool wide) {
  cache_.reset();  // its pages go first
  cache_ = std::make_unique<SequenceCache>(pool_, wide);
}

void Session::compute(const std::vector<int32_t>& pending) {
  const int32_t count = static_cast<int32_t>(pending.size());
  const Reading reading(model_->decoder(), {{cache_.get(), count, 1}}, pending.data(), count);
  logits_.resize(static_cast<size_t>(model_->vocabulary()));
  reading.logits(model_->decoder(), logits_.data());
}

void Session::rewind(int32_t length) {
  require(length >= 0 && length <= this->length(), "a text of " + std::to_string(this->length()) +
                                                       " tokens cannot be cut back to " + std::to_string(length));
  ids_.resize(static_cast<size_t>(length));
  cache_->set_length(std::min(length, cache_->length()));
  logits_.clear();
}

int32_t Session::sample(const Sampling& s) {
  require(s.temperature >= 0.0 && std::isfinite(s.temperature), "the temperature must be 0 (the likeliest token) or a number above it");
  require(s.top_k >= 0, "top_k must be 0 (all tokens) or how many of the likeliest may be chosen");
  require(s.top_p > 0.0 && s.top_p <= 1.0, "top_p must be a probability above 0 and at most 1");
  require(!logits_.empty(), "there are no logits yet: feed a token first");
  const int32_t count = model_->vocabulary();
  const int32_t token = s.temperature == 0.0 ? likeliest(logits_.data(), count)
                                             : quern::sample(logits_.data(), count, s.temperature, std::min(s.top_k, count), s.top_p, draw_.next());
  if (token < 0) throw std::runtime_error("the model's output holds NaN or infinite values, so its weights are broken. Make the file again");
  return token;
}

}  // namespace quern
