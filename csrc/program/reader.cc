#include "program/reader.h"

#include <cmath>

#include "engine/routing.h"
#include "kernels/checked_weight.h"
#include "kernels/matmul.h"

namespace quern {
namespace {

constexpr int32_t MOST_WIDTH = 1 << 24;     // numbers of a buffer for a token
constexpr int32_t MOST_HEAD = 1 << 12;      // channels of a head
constexpr int32_t MOST_CONTEXT = 1 << 28;   // tokens

void require(bool condition, const char* message) {
  if (!condition) throw BadFile(message);
}

class Reader {
 public:
  Reader(const uint8_t* file, uint64_t bytes, Cursor cursor) : file_(file), bytes_(bytes), cursor_(cursor) {}

  int32_t number() { return cursor_.number<int32_t>(); }
  float real() { return cursor_.number<float>(); }

  int32_t within(int32_t least, int32_t most, const char* message) {
    const int32_t found = number();
    require(found >= least && found <= most, message);
    return found;
  }

  bool flag() { return within(0, 1, "a yes or no is neither") == 1; }

  Span array() {
    const uint64_t at = cursor_.number<uint64_t>(), size = cursor_.number<uint64_t>();
    if (size == 0) return {};
    require(at % ALIGNMENT == 0, "an array does not begin at a multiple of 64 bytes");
    require(at <= bytes_ && size <= bytes_ - at, "an array lies outside of the file");
    return {file_ + at, static_cast<int64_t>(size)};
  }

  // Numbers of an array, as many as there are.
  struct Floats {
    const float* data;
    int64_t count;
  };
  Floats floats() {
    const Span found = array();
    require(found.size % 4 == 0, "an array of numbers ends inside of one");
    return {static_cast<const float*>(found.data), found.size / 4};
  }

  Weight weight() {
    WeightArrays given;
    given.kind = cursor_.text();
    given.rows = number();
    given.columns = within(1, MAX_COLUMNS, "a matrix has more columns than products can sum");
    given.group = number();
    given.scale_type = static_cast<Float>(within(0, static_cast<int32_t>(Float::float8_e8m0), "scales are of no known type"));
    given.one_scale = flag();
    given.bits = number();
    given.window = number();
    given.tables = number();
    given.lag = number();
    given.scale_factor = real();
    given.codes = array();
    given.scale = array();
    given.zeros = array();
    given.table = array();
    require(given.scale.data == nullptr || given.scale_type != Float{}, "scales are of no known type");
    return checked_weight(given);
  }

  Linear linear() {
    Linear made{weight(), nullptr, nullptr, false, {}};
    const Floats bias = floats();
    const Span signs = array();
    made.bias = bias.data;
    made.signs = static_cast<const uint8_t*>(signs.data);
    made.fine = flag();
    made.input.given = real();
    made.input.whole = flag();
    check(made, bias.count, signs.size);
    return made;
  }

  GatedMlp mlp() {
    Linear gate = linear(), up = linear();
    return {gate, up, linear()};
  }

  Activation activation() {
    return static_cast<Activation>(within(0, 2, "an activation is of no known kind"));
  }

  std::shared_ptr<const Step> routed() {
    RoutedPlaces places;
    for (int32_t* place : {&places.from, &places.scores, &places.gate, &places.up, &places.made, &places.to}) *place = number();
    Router router;
    router.per_token = number();
    router.renormalize = flag();
    const Activation function = activation();
    std::vector<GatedMlp> experts;
    for (uint32_t left = cursor_.count(4); left > 0; --left) experts.push_back(mlp());
    if (!flag()) return std::make_shared<Routed>(places, router, function, std::move(experts), std::nullopt, std::nullopt);
    SharedPlaces beside;
    for (int32_t* place : {&beside.score, &beside.gate, &beside.up, &beside.made}) *place = number();
    return std::make_shared<Routed>(places, router, function, std::move(experts), beside, mlp());
  }

  DecoderShape shape() {
    DecoderShape made;
    made.vocabulary = within(1, INT32_MAX, "a vocabulary has at least one token");
    for (uint32_t left = cursor_.count(4); left > 0; --left)
      made.widths.push_back(within(1, MOST_WIDTH, "a buffer has an impossible width"));
    for (uint32_t left = cursor_.count(8); left > 0; --left) {
      const int32_t heads = within(1, MOST_WIDTH, "there must be at least one key/value head");
      made.layers.push_back({heads, within(2, MOST_HEAD, "a head has an impossible number of channels")});
      require(static_cast<int64_t>(heads) * made.layers.back().head_dim <= MOST_WIDTH, "keys have an impossible width");
    }
    require(!made.layers.empty(), "a decoder has at least one layer");
    for (uint32_t left = cursor_.count(12); left > 0; --left) {
      RotaryShape rotary;
      rotary.factor = real();
      const uint32_t sets = cursor_.count(4), half = cursor_.count(4);
      require(half > 0 && sets > 0 && sets <= 2, "one or two sets of rotary frequencies");
      rotary.frequencies.resize(sets);
      for (auto& set : rotary.frequencies)
        for (uint32_t i = 0; i < half; ++i) set.push_back(real());
      made.rotaries.push_back(std::move(rotary));
    }
    return made;
  }

  std::shared_ptr<const Step> step() {
    switch (static_cast<StepCode>(number())) {
      case StepCode::embed: {
        const Weight table = weight();
        return std::make_shared<Embed>(table, number());
      }
      case StepCode::norm: {
        const int32_t from = number(), to = number();
        const Floats scale = floats();
        require(scale.count <= MOST_WIDTH, "a norm has an impossible width");
        return std::make_shared<Norm>(from, to, scale.data, static_cast<int32_t>(scale.count), real());
      }
      case StepCode::project: {
        const int32_t from = number();
        std::vector<Linear> linears;
        std::vector<int32_t> to;
        for (uint32_t left = cursor_.count(4); left > 0; --left) {
          linears.push_back(linear());
          to.push_back(number());
        }
        return std::make_shared<Project>(from, std::move(linears), std::move(to));
      }
      case StepCode::rotate: {
        const int32_t buffer = number(), rotary = number();
        return std::make_shared<Rotate>(buffer, rotary, real());
      }
      case StepCode::store: {
        const int32_t layer = number(), keys = number(), values = number(), rotary = number();
        const Floats bias = floats();
        return std::make_shared<Store>(layer, keys, values, bias.data, bias.count, rotary);
      }
      case StepCode::attend: {
        const int32_t layer = number(), queries = number(), to = number(), window = number(), rotary = number();
        const Floats bias = floats();
        return std::make_shared<AttendStep>(layer, queries, to, window, bias.data, bias.count, rotary);
      }
      case StepCode::activate: {
        const Activation function = activation();
        const int32_t gate = number();
        return std::make_shared<Activate>(function, gate, within(-1, INT32_MAX, "a step names no buffer"));
      }
      case StepCode::add: {
        const int32_t from = number();
        return std::make_shared<Add>(from, number());
      }
      case StepCode::routed:
        return routed();
    }
    throw BadFile("a step is of no known kind");
  }

  ReadProgram program(int threads, Cursor tokenizer) {
    ModelFacts facts;
    facts.context = within(1, MOST_CONTEXT, "the context has an impossible length");
    facts.switch_length = within(0, MOST_CONTEXT, "the context has an impossible length");
    DecoderShape found = shape();
    std::vector<std::shared_ptr<const Step>> steps;
    for (uint32_t left = cursor_.count(4); left > 0; --left) steps.push_back(step());
    const int32_t output = number();
    const Linear head = linear();
    require(cursor_.done(), "the program goes on behind its end");
    return {facts, std::make_unique<Decoder>(std::move(found), std::move(steps), output, head, threads), tokenizer};
  }

 private:
  const uint8_t* file_;
  uint64_t bytes_;
  Cursor cursor_;
};

}  // namespace

ReadProgram read_program(const uint8_t* file, uint64_t bytes, int threads) {
  Header header;
  require(bytes >= sizeof header && memcmp(file, MAGIC, sizeof MAGIC) == 0, "it is no run file");
  memcpy(&header, file, sizeof header);
  if (header.version != VERSION)
    throw BadFile("it is of version " + std::to_string(header.version) + "; this program reads version " + std::to_string(VERSION));
  if (header.file_bytes != bytes)
    throw BadFile("it has " + std::to_string(bytes) + " bytes and should have " + std::to_string(header.file_bytes));
  const auto part = [&](uint64_t at, uint64_t size, const char* what) {
    require(at % ALIGNMENT == 0 && at <= bytes && size <= bytes - at, "a part of it lies outside of the file");
    return Cursor(file + at, size, what);
  };
  const Cursor program = part(header.program_at, header.program_bytes, "its program");
  return Reader(file, bytes, program).program(threads, part(header.tokenizer_at, header.tokenizer_bytes, "its tokenizer"));
}

}  // namespace quern
