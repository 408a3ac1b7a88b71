// quern-run: continue a text with a model. What it does, it does by quern.h.
#include <getopt.h>

#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "quern.h"

namespace {

const char USAGE[] =
    "usage: quern-run MODEL [-p PROMPT] [options]\n"
    "Continue a text with a model; it streams to stdout. Without a prompt, stdin is read.\n"
    "MODEL is a file: quern export ARTIFACT --format run -o NAME.run\n\n"
    "  -p, --prompt TEXT    text to continue\n"
    "      --ids N,N,...    token numbers to continue instead\n"
    "  -n, --max-tokens N   most tokens to write (128)\n"
    "      --temperature T  0: always the likeliest token (0)\n"
    "      --top-k K        only the K likeliest tokens; 0: all (0)\n"
    "      --top-p P        only the likeliest tokens that together reach this probability (1)\n"
    "      --seed S         same seed, same text (0)\n"
    "      --threads N      0: as many as there are processors (0)\n"
    "      --context N      most tokens of prompt and text; 0: the model's, or what memory has room for (0)\n"
    "      --cache C        keys and values as float32, float16, int8 or int4 (float16, wider where a text needs it)\n"
    "      --tokens         write token numbers instead of text, the prompt's on a line before\n"
    "      --logits FILE    write the logits of every choice there, float32, a row each\n"
    "      --stats          say on stderr what was measured\n"
    "      --help           this\n";

struct Options {
  std::string model, prompt, logits, cache;
  std::vector<int32_t> ids;
  bool prompted = false, numbered = false, tokens = false, stats = false;
  int32_t count = 128, threads = 0, context = 0;
  uint64_t seed = 0;
  quern_sampling sampling{0.0, 0, 1.0};
};

[[noreturn]] void refuse(const std::string& reason) {
  std::fflush(stdout);
  std::fprintf(stderr, "error: %s\n", reason.c_str());
  std::exit(2);
}

void check(int result) {
  if (result != QUERN_OK) refuse(quern_error());
}

int64_t whole(const char* option, const char* text, int64_t least, int64_t most) {
  char* end = nullptr;
  errno = 0;
  const long long found = std::strtoll(text, &end, 10);
  if (end == text || *end != '\0' || errno != 0 || found < least || found > most)
    refuse(std::string(option) + " is '" + text + "'; give a whole number from " + std::to_string(least) + " to " + std::to_string(most));
  return found;
}

double real(const char* option, const char* text) {
  char* end = nullptr;
  const double found = std::strtod(text, &end);
  if (end == text || *end != '\0' || !std::isfinite(found)) refuse(std::string(option) + " is '" + text + "'; give a number");
  return found;
}

std::vector<int32_t> listed(const char* text) {
  std::vector<int32_t> ids;
  std::string rest = text;
  while (true) {
    const size_t comma = rest.find(',');
    ids.push_back(static_cast<int32_t>(whole("--ids", rest.substr(0, comma).c_str(), 0, INT32_MAX)));
    if (comma == std::string::npos) return ids;
    rest = rest.substr(comma + 1);
  }
}

enum Long { IDS = 1000, TEMPERATURE, TOP_K, TOP_P, SEED, THREADS, CONTEXT, CACHE, TOKENS, LOGITS, STATS, HELP };

Options parsed(int count, char** arguments) {
  static const option known[] = {
      {"prompt", required_argument, nullptr, 'p'},      {"max-tokens", required_argument, nullptr, 'n'},
      {"ids", required_argument, nullptr, IDS},         {"temperature", required_argument, nullptr, TEMPERATURE},
      {"top-k", required_argument, nullptr, TOP_K},     {"top-p", required_argument, nullptr, TOP_P},
      {"seed", required_argument, nullptr, SEED},       {"threads", required_argument, nullptr, THREADS},
      {"context", required_argument, nullptr, CONTEXT}, {"cache", required_argument, nullptr, CACHE},
      {"tokens", no_argument, nullptr, TOKENS},         {"logits", required_argument, nullptr, LOGITS},
      {"stats", no_argument, nullptr, STATS},           {"help", no_argument, nullptr, HELP},
      {nullptr, 0, nullptr, 0},
  };
  Options o;
  opterr = 0;
  for (int found; (found = getopt_long(count, arguments, "p:n:", known, nullptr)) != -1;) switch (found) {
      case 'p': o.prompt = optarg, o.prompted = true; break;
      case 'n': o.count = static_cast<int32_t>(whole("--max-tokens", optarg, 1, INT32_MAX)); break;
      case IDS: o.ids = listed(optarg), o.numbered = true; break;
      case TEMPERATURE: o.sampling.temperature = real("--temperature", optarg); break;
      case TOP_K: o.sampling.top_k = static_cast<int32_t>(whole("--top-k", optarg, 0, INT32_MAX)); break;
      case TOP_P: o.sampling.top_p = real("--top-p", optarg); break;
      case SEED: o.seed = static_cast<uint64_t>(whole("--seed", optarg, 0, INT64_MAX)); break;
      case THREADS: o.threads = static_cast<int32_t>(whole("--threads", optarg, 0, 4096)); break;
      case CONTEXT: o.context = static_cast<int32_t>(whole("--context", optarg, 0, INT32_MAX)); break;
      case CACHE: o.cache = optarg; break;
      case TOKENS: o.tokens = true; break;
      case LOGITS: o.logits = optarg; break;
      case STATS: o.stats = true; break;
      case HELP: std::fputs(USAGE, stdout); std::exit(0);
      default: refuse(std::string("'") + arguments[optind - 1] + "' is no option, or lacks its value; quern-run --help lists all");
    }
  if (optind + 1 != count) refuse("give one MODEL, a file that quern export --format run wrote; quern-run --help lists all options");
  o.model = arguments[optind];
  if (o.prompted && o.numbered) refuse("give --prompt or --ids, not both");
  return o;
}

std::string standard_input() {
  std::string text;
  char buffer[1 << 16];
  for (size_t got; (got = std::fread(buffer, 1, sizeof buffer, stdin)) > 0;) text.append(buffer, got);
  return text;
}

// The whole result of a function that first says how much there is.
template <typename T, typename Function>
std::vector<T> whole_of(Function function) {
  std::vector<T> found(256);
  for (size_t count = 0;; found.resize(count)) {
    check(function(found.data(), found.size(), &count));
    if (count <= found.size()) {
      found.resize(count);
      return found;
    }
  }
}

std::vector<int32_t> prompt_of(const Options& o, const quern_model* model) {
  if (o.numbered) return o.ids;
  const std::string text = o.prompted ? o.prompt : standard_input();
  const auto ids = whole_of<int32_t>([&](int32_t* tokens, size_t room, size_t* count) {
    return quern_tokenize(model, text.data(), text.size(), tokens, room, count);
  });
  if (ids.empty()) refuse("the prompt is empty; give at least one character to continue");
  return ids;
}

// Text of tokens that come one at a time, never half a character; or their numbers.
class Writer {
 public:
  Writer(const quern_model* model, bool numbers) : model_(model), numbers_(numbers) {}

  void line(const std::vector<int32_t>& ids) {
    for (size_t i = 0; i < ids.size(); ++i) std::printf(i == 0 ? "%d" : " %d", ids[i]);
    std::printf("\n");
  }

  void push(int32_t token) {
    if (numbers_) {
      std::printf(written_++ == 0 ? "%d" : " %d", token);
      std::fflush(stdout);
      return;
    }
    held_.push_back(token);
    const std::vector<char> text = decoded();
    const char unfinished[] = "\xef\xbf\xbd";
    if (text.size() >= 3 && std::memcmp(text.data() + text.size() - 3, unfinished, 3) == 0) return;
    put(text);
  }

  void finish() {
    put(decoded());
    std::printf("\n");
    if (std::fflush(stdout) != 0) refuse(std::string("the output cannot be written: ") + std::strerror(errno));
  }

 private:
  std::vector<char> decoded() const {
    return whole_of<char>([&](char* text, size_t room, size_t* bytes) {
      return quern_detokenize(model_, held_.data(), held_.size(), text, room, bytes);
    });
  }

  void put(const std::vector<char>& text) {
    std::fwrite(text.data(), 1, text.size(), stdout);
    std::fflush(stdout);
    held_.clear();
  }

  const quern_model* model_;
  bool numbers_;
  int written_ = 0;
  std::vector<int32_t> held_;
};

// Megabytes; 0 where the system does not say. Not getrusage's, in which whoever started the process counts.
double peak_memory() {
  long kib = 0;
  if (std::FILE* file = std::fopen("/proc/self/status", "r")) {
    char line[256];
    while (std::fgets(line, sizeof line, file) != nullptr)
      if (std::sscanf(line, "VmHWM: %ld kB", &kib) == 1) break;
    std::fclose(file);
  }
  return 1.024e-3 * static_cast<double>(kib);
}

using Clock = std::chrono::steady_clock;

double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

void run(const Options& o) {
  const auto start = Clock::now();
  quern_model* model = nullptr;
  quern_session* session = nullptr;
  check(quern_load(o.model.c_str(), o.threads, &model));
  const std::vector<int32_t> ids = prompt_of(o, model);
  check(quern_open(model, o.context, o.cache.empty() ? nullptr : o.cache.c_str(), &session));
  if (ids.size() >= quern_room(session))
    refuse("the prompt has " + std::to_string(ids.size()) + " tokens and the context room for " + std::to_string(quern_room(session)) +
           ", which leaves none to continue; give a shorter prompt");
  quern_seed(session, o.seed);
  std::FILE* logits = o.logits.empty() ? nullptr : std::fopen(o.logits.c_str(), "wb");
  if (!o.logits.empty() && logits == nullptr) refuse(o.logits + " cannot be written: " + std::strerror(errno));
  const double loaded = since(start);
  const auto begun = Clock::now();
  check(quern_feed(session, ids.data(), ids.size()));
  const double read = since(begun);
  Writer writer(model, o.tokens);
  if (o.tokens) writer.line(ids);
  int32_t made = 0, token = 0;
  const auto first = Clock::now();
  while (made < o.count) {
    const size_t width = static_cast<size_t>(quern_vocabulary(model));
    if (logits != nullptr && std::fwrite(quern_logits(session), sizeof(float), width, logits) != width)
      refuse(o.logits + " cannot be written: " + std::strerror(errno));
    check(quern_sample(session, &o.sampling, &token));
    if (quern_ends(model, token)) break;
    writer.push(token);
    ++made;
    if (made == o.count || quern_room(session) == 0) break;
    check(quern_feed(session, &token, 1));
  }
  writer.finish();
  if (logits != nullptr && std::fclose(logits) != 0) refuse(o.logits + " cannot be written: " + std::strerror(errno));
  if (o.stats) {
    const double seconds = since(first);
    std::fprintf(stderr,
                 "instruction set %s; ready in %.1f ms; prompt %zu tokens in %.1f ms; %d tokens, %.1f tokens/s; file %.1f MB, "
                 "cache %.1f KB a token; peak memory %.1f MB, the file's pages that were read included\n",
                 quern_instruction_set(), 1e3 * loaded, ids.size(), 1e3 * read, made, made > 1 ? (made - 1) / seconds : 0.0,
                 1e-6 * static_cast<double>(quern_file_bytes(model)),
                 1e-3 * static_cast<double>(quern_cache_bytes_per_token(session)), peak_memory());
  }
  quern_close(session);
  quern_free(model);
}

}  // namespace

int main(int count, char** arguments) {
  try {
    run(parsed(count, arguments));
  } catch (const std::exception&) {
    refuse("the system gives no memory for this. Use a shorter context or prompt, or free memory");
  }
  return 0;
}
