// The C interface: handles for models and texts, exceptions as numbers and words.
#include "quern.h"

#include <algorithm>
#include <exception>
#include <memory>
#include <new>
#include <string>

#include "kernels/dispatch.h"
#include "run/model.h"
#include "run/unicode.h"

struct quern_model {
  std::shared_ptr<quern::Model> model;
};

struct quern_session {
  std::shared_ptr<quern::Model> model;
  quern::Session session;
};

namespace {

thread_local std::string failure;

int failed(int number, const char* reason) noexcept {
  try {
    failure = reason;
  } catch (...) {
    failure.clear();
  }
  return number;
}

template <typename Function>
int guarded(Function function) noexcept {
  try {
    function();
    return QUERN_OK;
  } catch (const std::bad_alloc&) {
    return failed(QUERN_MEMORY, "the system gives no memory for this. Use a shorter context or text, or free memory");
  } catch (const std::invalid_argument& error) {
    return failed(QUERN_INVALID, error.what());
  } catch (const quern::BadFile& error) {
    return failed(QUERN_INVALID, error.what());
  } catch (const std::length_error&) {
    return failed(QUERN_MEMORY, "the system gives no memory for this. Use a shorter context or text, or free memory");
  } catch (const std::exception& error) {
    return failed(QUERN_BROKEN, error.what());
  } catch (...) {
    return failed(QUERN_BROKEN, "something went wrong that has no name");
  }
}

// As much as there is room for; how much there is.
template <typename From, typename T>
void give(const From& found, T* to, size_t room, size_t* count) {
  std::copy_n(found.begin(), to == nullptr ? 0 : std::min(room, found.size()), to);
  *count = found.size();
}

}  // namespace

extern "C" {

const char* quern_error(void) { return failure.c_str(); }

int quern_load(const char* path, int32_t threads, quern_model** model) {
  *model = nullptr;
  return guarded([&] {
    if (threads < 0) throw std::invalid_argument("the number of threads must be 0 (as many as there are processors) or more");
    *model = new quern_model{std::make_shared<quern::Model>(path, threads)};
  });
}

void quern_free(quern_model* model) { delete model; }

int32_t quern_vocabulary(const quern_model* model) { return model->model->vocabulary(); }
int32_t quern_context(const quern_model* model) { return model->model->facts().context; }
uint64_t quern_file_bytes(const quern_model* model) { return model->model->file_bytes(); }

const char* quern_instruction_set(void) {
  static thread_local std::string name;
  if (guarded([] { name = quern::active_isa(); }) != QUERN_OK) name.clear();
  return name.c_str();
}

int quern_tokenize(const quern_model* model, const char* text, size_t bytes, int32_t* tokens, size_t room, size_t* count) {
  *count = 0;
  return guarded([&] { give(model->model->tokenizer().encode(std::string(text, bytes)), tokens, room, count); });
}

int quern_detokenize(const quern_model* model, const int32_t* tokens, size_t count, char* text, size_t room, size_t* bytes) {
  *bytes = 0;
  return guarded([&] {
    std::string found;
    for (size_t i = 0; i < count; ++i) found += model->model->tokenizer().bytes_of(tokens[i]);
    give(quern::unicode::replaced(found), text, room, bytes);
  });
}

int quern_ends(const quern_model* model, int32_t token) { return model->model->tokenizer().ends(token) ? 1 : 0; }

int quern_open(quern_model* model, int32_t context, const char* cache, quern_session** session) {
  *session = nullptr;
  return guarded([&] {
    *session = new quern_session{model->model, quern::Session(model->model, context, cache == nullptr ? "" : cache)};
  });
}

void quern_close(quern_session* session) { delete session; }

int quern_feed(quern_session* session, const int32_t* tokens, size_t count) {
  return guarded([&] {
    session->session.feed(tokens, static_cast<int64_t>(std::min<size_t>(count, INT32_MAX)));
  });
}

int quern_rewind(quern_session* session, size_t length) {
  return guarded([&] { session->session.rewind(static_cast<int32_t>(std::min<size_t>(length, INT32_MAX))); });
}

size_t quern_length(const quern_session* session) { return static_cast<size_t>(session->session.length()); }

size_t quern_room(const quern_session* session) {
  return static_cast<size_t>(session->session.context() - session->session.length());
}

uint64_t quern_cache_bytes_per_token(const quern_session* session) {
  return static_cast<uint64_t>(session->session.bytes_per_token()) * (session->session.wide() ? 2 : 1);
}

const float* quern_logits(const quern_session* session) {
  return session->session.logits().empty() ? nullptr : session->session.logits().data();
}

void quern_seed(quern_session* session, uint64_t seed) { session->session.seed(seed); }

int quern_sample(quern_session* session, const quern_sampling* sampling, int32_t* token) {
  *token = -1;
  return guarded([&] { *token = session->session.sample({sampling->temperature, sampling->top_k, sampling->top_p}); });
}

}  // extern "C"
