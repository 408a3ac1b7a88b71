/* Run a model from C: a file that `quern export MODEL --format run -o NAME.run` wrote, weights mapped and not copied.
 *
 * Functions that return int return QUERN_OK or one of the other numbers; quern_error() then says what was wrong, in words for a
 * person. Nothing is printed, no function ends the process, no exception leaves one. A model may be used by several sessions, but
 * by one thread at a time. docs/run.md has an example. */
#ifndef QUERN_H
#define QUERN_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
  QUERN_OK = 0,
  QUERN_INVALID = 1, /* an argument or a file that cannot be used */
  QUERN_MEMORY = 2,  /* the system gives no memory */
  QUERN_BROKEN = 3   /* the model's output is no number, or its cache too narrow */
};

typedef struct quern_model quern_model;
typedef struct quern_session quern_session;

/* Why the last function that this thread called and that failed did so. Valid until the next one fails. */
const char* quern_error(void);

/* Open a file. `threads`: 0 for as many as the process may use. */
int quern_load(const char* path, int32_t threads, quern_model** model);
/* NULL is allowed. Sessions that are open keep what they need. */
void quern_free(quern_model* model);

int32_t quern_vocabulary(const quern_model* model);
int32_t quern_context(const quern_model* model); /* the most tokens that the model was made for */
uint64_t quern_file_bytes(const quern_model* model);
/* Which kernels run: scalar, avx2, avx512, amx, neon, i8mm. The environment variable QUERN_ISA asks for another. */
const char* quern_instruction_set(void);

/* Tokens of `bytes` bytes of UTF-8, behind the token that begins texts where the model has one. Writes as many as `room` has place
 * for; `count`: how many there are. */
int quern_tokenize(const quern_model* model, const char* text, size_t bytes, int32_t* tokens, size_t room, size_t* count);
/* The text of tokens, without those that are not text; U+FFFD stands for bytes that are no (or not yet a) character. Writes as many
 * bytes as `room` has place for, no zero behind them; `bytes`: how many there are. */
int quern_detokenize(const quern_model* model, const int32_t* tokens, size_t count, char* text, size_t room, size_t* bytes);
/* Whether a token ends a text or a turn: 1 or 0. */
int quern_ends(const quern_model* model, int32_t token);

/* Begin a text. `context`: the most tokens that it may have; 0: the model's, or what free memory has room for. `cache`: how keys and
 * values are kept, "float32", "float16", "int8" or "int4"; NULL: float16, and float32 for a text that this cannot hold. */
int quern_open(quern_model* model, int32_t context, const char* cache, quern_session** session);
void quern_close(quern_session* session); /* NULL is allowed */

/* Append tokens to the text; where it fails none were. */
int quern_feed(quern_session* session, const int32_t* tokens, size_t count);
/* Forget all tokens but the first `length`; feed one before the next choice. */
int quern_rewind(quern_session* session, size_t length);
size_t quern_length(const quern_session* session);
size_t quern_room(const quern_session* session); /* tokens that still fit */
uint64_t quern_cache_bytes_per_token(const quern_session* session);
/* quern_vocabulary numbers, of the token that follows the text; NULL before the first quern_feed. Valid until the next call. */
const float* quern_logits(const quern_session* session);

typedef struct {
  double temperature; /* 0: always the likeliest token */
  int32_t top_k;      /* only so many of the likeliest; 0: all */
  double top_p;       /* only the likeliest that together reach this probability; 1: all */
} quern_sampling;

/* The same seed chooses the same tokens, here and in `quern generate`. 0 where it is not called. */
void quern_seed(quern_session* session, uint64_t seed);
/* Choose the next token; it is not appended. */
int quern_sample(quern_session* session, const quern_sampling* sampling, int32_t* token);

#ifdef __cplusplus
}
#endif
#endif
