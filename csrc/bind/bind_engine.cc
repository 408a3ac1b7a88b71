// The decoder as Python sees it: matrices, a decoder made of them, caches, and one call a step.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <mutex>
#include <new>

#include "bind/matrix.h"
#include "engine/decoder.h"
#include "engine/reading.h"
#include "engine/routing.h"
#include "engine/sampling.h"
#include "program/writer.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace quern {
namespace {

struct LinearArrays {
  std::shared_ptr<Matrix> matrix;
  std::optional<Floats> bias;
  std::optional<Bytes> signs;
  bool fine;
  InputScale input;

  LinearArrays(std::shared_ptr<Matrix> m, std::optional<Floats> b, std::optional<Bytes> s, bool f,
               std::optional<float> input_scale, bool one_input_scale)
      : matrix(std::move(m)), bias(std::move(b)), signs(std::move(s)), fine(f), input{input_scale.value_or(0.0f), one_input_scale} {
    require(!input_scale || *input_scale != 0.0f, "a scale of inputs is above zero");
    check(view(), bias ? static_cast<int64_t>(bias->size()) : 0, signs ? static_cast<int64_t>(signs->size()) : 0);
  }

  Linear view() const {
    return {matrix->weight(), bias ? bias->data() : nullptr, signs ? signs->data() : nullptr, fine, input};
  }
};

// A step that keeps its arrays alive.
struct BoundStep {
  std::shared_ptr<const Step> step;
  std::vector<Floats> vectors;
  std::vector<std::shared_ptr<Matrix>> matrices;
  std::vector<std::shared_ptr<LinearArrays>> linears;
};

class BoundDecoder {
 public:
  BoundDecoder(DecoderShape shape, std::vector<std::shared_ptr<BoundStep>> steps, int32_t output,
               std::shared_ptr<LinearArrays> head, int threads)
      : steps_(std::move(steps)), head_(std::move(head)) {
    std::vector<std::shared_ptr<const Step>> views;
    for (const auto& step : steps_) views.push_back(step->step);
    decoder_ = std::make_unique<Decoder>(std::move(shape), std::move(views), output, head_->view(), threads);
  }

  Decoder& decoder() { return *decoder_; }

  CacheShape cache_shape(CachePrecision precision, bool transformed = true) const {
    return {decoder_->shape().layers, precision, transformed};
  }

  // Tokens of several sequences, `counts[i]` of them for `caches[i]`. Of the last `wanted[i]` of each: the logits, or with
  // `hidden` what the head reads.
  nb::ndarray<nb::numpy, float, nb::ndim<2>> read(const std::vector<SequenceCache*>& caches, const std::vector<int32_t>& counts,
                                                 Array<int32_t, nb::ndim<1>> tokens, const std::vector<int32_t>& wanted,
                                                 bool hidden) {
    require(caches.size() == counts.size() && caches.size() == wanted.size(), "two counts a sequence, and at least one sequence");
    std::vector<Fed> fed;
    for (size_t i = 0; i < caches.size(); ++i) fed.push_back({caches[i], counts[i], wanted[i]});
    const Reading reading(*decoder_, fed, tokens.data(), static_cast<int64_t>(tokens.size()));
    const size_t count = static_cast<size_t>(reading.wanted());
    const size_t across = static_cast<size_t>(hidden ? decoder_->width() : decoder_->shape().vocabulary);
    std::unique_ptr<float[]> out(new float[count * across]);
    {
      nb::gil_scoped_release released;
      std::lock_guard<std::mutex> lock(mutex_);
      hidden ? reading.hidden(*decoder_, out.get()) : reading.logits(*decoder_, out.get());
    }
    return owned(std::move(out), count, across);
  }

  // Logits of every token, or of each sequence's last.
  nb::ndarray<nb::numpy, float, nb::ndim<2>> feed(const std::vector<SequenceCache*>& caches, const std::vector<int32_t>& counts,
                                                 Array<int32_t, nb::ndim<1>> tokens, bool all) {
    return read(caches, counts, tokens, all ? counts : std::vector<int32_t>(counts.size(), 1), false);
  }

 private:
  std::vector<std::shared_ptr<BoundStep>> steps_;
  std::shared_ptr<LinearArrays> head_;
  std::unique_ptr<Decoder> decoder_;
  std::mutex mutex_;
};

CachePrecision precision_of(const std::string& name) {
  if (name == "int4") return CachePrecision::int4;
  if (name == "int8") return CachePrecision::int8;
  if (name == "float16") return CachePrecision::float16;
  if (name == "float32") return CachePrecision::float32;
  throw std::invalid_argument("unknown cache precision '" + name + "'; known: int4, int8, float16, float32");
}

Activation activation_of(const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  throw std::invalid_argument("unknown activation '" + name + "'; known: silu, gelu, gelu_tanh");
}

using Layers = std::vector<std::pair<int32_t, int32_t>>;                       // heads, head_dim
using Rotaries = std::vector<std::pair<std::vector<std::vector<float>>, float>>;  // sets of frequencies, factor

std::vector<CacheLayer> cache_layers(const Layers& layers) {
  std::vector<CacheLayer> made;
  for (const auto& [heads, head_dim] : layers) made.push_back({heads, head_dim});
  return made;
}

DecoderShape shape_of(std::vector<int32_t> widths, const Layers& layers, const Rotaries& rotaries, int32_t vocabulary) {
  DecoderShape shape{std::move(widths), cache_layers(layers), {}, vocabulary};
  for (const auto& [frequencies, factor] : rotaries) shape.rotaries.push_back({frequencies, factor});
  return shape;
}

template <typename Kind>
std::shared_ptr<BoundStep> bound(Kind step) {
  auto made = std::make_shared<BoundStep>();
  made->step = std::make_shared<const Kind>(std::move(step));
  return made;
}

std::shared_ptr<BoundStep> project(int32_t from, std::vector<std::shared_ptr<LinearArrays>> linears, std::vector<int32_t> to) {
  std::vector<Linear> views;
  for (const auto& linear : linears) views.push_back(linear->view());
  auto made = bound(Project(from, std::move(views), std::move(to)));
  made->linears = std::move(linears);
  return made;
}

const float* optional_vector(const std::optional<Floats>& vector) { return vector ? vector->data() : nullptr; }

std::shared_ptr<BoundStep> keeping(std::shared_ptr<BoundStep> made, std::optional<Floats> vector) {
  if (vector) made->vectors.push_back(std::move(*vector));
  return made;
}

int64_t size_of(const std::optional<Floats>& vector) { return vector ? static_cast<int64_t>(vector->size()) : 0; }

std::shared_ptr<BoundStep> embed(std::shared_ptr<Matrix> table, int32_t to) {
  auto made = bound(Embed(table->weight(), to));
  made->matrices.push_back(std::move(table));
  return made;
}

std::shared_ptr<BoundStep> norm(int32_t from, int32_t to, Floats weight, float epsilon) {
  return keeping(bound(Norm(from, to, weight.data(), static_cast<int32_t>(weight.size()), epsilon)), weight);
}

std::shared_ptr<BoundStep> store(int32_t layer, int32_t keys, int32_t values, std::optional<Floats> bias, int32_t rotary) {
  return keeping(bound(Store(layer, keys, values, optional_vector(bias), size_of(bias), rotary)), bias);
}

std::shared_ptr<BoundStep> attend(int32_t layer, int32_t queries, int32_t to, int32_t window, std::optional<Floats> bias,
                                  int32_t rotary) {
  return keeping(bound(AttendStep(layer, queries, to, window, optional_vector(bias), size_of(bias), rotary)), bias);
}

using MlpArrays = std::tuple<std::shared_ptr<LinearArrays>, std::shared_ptr<LinearArrays>, std::shared_ptr<LinearArrays>>;

std::shared_ptr<BoundStep> routed(std::tuple<int32_t, int32_t, int32_t, int32_t, int32_t, int32_t> places, int32_t per_token,
                                  bool renormalize, const std::string& activation, std::vector<MlpArrays> experts,
                                  std::optional<std::tuple<int32_t, int32_t, int32_t, int32_t>> shared_places,
                                  std::optional<MlpArrays> shared) {
  std::vector<std::shared_ptr<LinearArrays>> kept;
  const auto view = [&](const MlpArrays& mlp) {
    for (const auto& linear : {std::get<0>(mlp), std::get<1>(mlp), std::get<2>(mlp)}) kept.push_back(linear);
    return GatedMlp{std::get<0>(mlp)->view(), std::get<1>(mlp)->view(), std::get<2>(mlp)->view()};
  };
  std::vector<GatedMlp> views;
  for (const MlpArrays& expert : experts) views.push_back(view(expert));
  const auto make = [](auto... each) { return RoutedPlaces{each...}; };
  const auto make_shared = [](auto... each) { return SharedPlaces{each...}; };
  std::optional<SharedPlaces> beside;
  if (shared_places) beside = std::apply(make_shared, *shared_places);
  std::optional<GatedMlp> shared_view;
  if (shared) shared_view = view(*shared);
  auto made = bound(Routed(std::apply(make, places), {per_token, renormalize}, activation_of(activation), std::move(views),
                           beside, std::move(shared_view)));
  made->linears = std::move(kept);
  return made;
}

// The program of a run file, and its arrays with where each begins in the file; they are the decoder's.
nb::tuple program(nb::handle self, int32_t context, int32_t switch_length) {
  const Program made = write_program(nb::cast<BoundDecoder&>(self).decoder(), {context, switch_length});
  nb::list arrays;
  for (const Placed& array : made.arrays) {
    const nb::ndarray<nb::numpy, const uint8_t, nb::ndim<1>> view(array.bytes.data, {static_cast<size_t>(array.bytes.size)}, self);
    arrays.append(nb::make_tuple(array.at, view));
  }
  return nb::make_tuple(nb::bytes(made.program.data(), made.program.size()), arrays);
}

void bind_steps(nb::module_& module) {
  nb::class_<BoundStep>(module, "Step")
      .def_static("embed", &embed, "table"_a, "to"_a)
      .def_static("norm", &norm, "source"_a, "to"_a, "weight"_a, "epsilon"_a)
      .def_static("project", &project, "source"_a, "linears"_a, "to"_a)
      .def_static("rotate", [](int32_t heads, int32_t rotary, float scale) { return bound(Rotate(heads, rotary, scale)); },
                  "heads"_a, "rotary"_a = 0, "scale"_a = 1.0f)
      .def_static("store", &store, "layer"_a, "keys"_a, "values"_a, "key_bias"_a = nb::none(), "rotary"_a = 0)
      .def_static("attend", &attend, "layer"_a, "queries"_a, "to"_a, "window"_a = 0, "key_bias"_a = nb::none(),
                  "rotary"_a = 0)
      .def_static("activate",
                  [](const std::string& activation, int32_t gate, std::optional<int32_t> up) {
                    return bound(Activate(activation_of(activation), gate, up.value_or(-1)));
                  },
                  "activation"_a, "gate"_a, "up"_a = nb::none())
      .def_static("routed", &routed, "places"_a, "per_token"_a, "renormalize"_a, "activation"_a, "experts"_a,
                  "shared_places"_a = nb::none(), "shared"_a = nb::none())
      .def_static("add", [](int32_t from, int32_t to) { return bound(Add(from, to)); }, "source"_a, "to"_a);
}

}  // namespace
}  // namespace quern

void bind_engine(nb::module_& module) {
  using namespace quern;
  nb::class_<Matrix>(module, "Matrix")
      .def(nb::init<const std::string&, int32_t, int32_t, Bytes, std::optional<Bytes>, const std::string&,
                    std::optional<int32_t>, bool, std::optional<Bytes>, std::optional<Array<int8_t, nb::ndim<1>>>,
                    int32_t, int32_t, int32_t, int32_t, float>(),
           "kind"_a, "rows"_a, "columns"_a, "codes"_a, "scale"_a = nb::none(), "scale_type"_a = "float16",
           "group"_a = nb::none(), "one_scale"_a = false, "zeros"_a = nb::none(), "table"_a = nb::none(), "bits"_a = 0,
           "window"_a = 0, "tables"_a = 1, "lag"_a = 0, "scale_factor"_a = 1.0f)
      .def_prop_ro("bytes", &Matrix::bytes);
  nb::class_<LinearArrays>(module, "Linear")
      .def(nb::init<std::shared_ptr<Matrix>, std::optional<Floats>, std::optional<Bytes>, bool, std::optional<float>, bool>(),
           "matrix"_a, "bias"_a = nb::none(), "signs"_a = nb::none(), "fine"_a = false, "input_scale"_a = nb::none(),
           "one_input_scale"_a = false);
  bind_steps(module);
  module.attr("CACHE_BLOCK") = BLOCK;
  module.def("cache_page_bytes",
             [](const Layers& layers, const std::string& precision) {
               for (const auto& [heads, head_dim] : layers)
                 require(heads > 0 && head_dim > 0 && head_dim % 2 == 0, "a layer keeps at least one head, of an even number of channels");
               return KeyValuePool::page_bytes({cache_layers(layers), precision_of(precision)});
             },
             "layers"_a, "precision"_a);
  nb::class_<KeyValuePool>(module, "Pool")
      .def_prop_ro("pages", &KeyValuePool::pages)
      .def_prop_ro("free_pages", &KeyValuePool::free_pages)
      .def_prop_ro("sequences", &KeyValuePool::sequences)
      .def("sequence",
           [](std::shared_ptr<KeyValuePool> self, bool wide) {
             require(!wide || self->shape().precision == CachePrecision::float16, "only float16 can be widened");
             return new SequenceCache(std::move(self), wide);
           },
           "wide"_a = false, nb::rv_policy::take_ownership);
  nb::class_<SequenceCache>(module, "Sequence")
      .def_prop_rw("length", &SequenceCache::length,
                   [](SequenceCache& cache, int32_t length) {
                     require(length >= 0 && length <= cache.length(), "a sequence can only be cut back");
                     cache.set_length(length);
                   })
      .def_prop_rw("rotary", &SequenceCache::rotary,
                   [](SequenceCache& cache, int32_t rotary) {
                     require(cache.length() == 0, "only an empty sequence can go by other rotary frequencies");
                     cache.set_rotary(rotary);
                   })
      .def_prop_ro("overflowed", &SequenceCache::overflowed)
      .def_prop_ro("wide", &SequenceCache::wide)
      .def_prop_ro("room", &SequenceCache::room)
      .def("fork",
           [](const SequenceCache& cache, int32_t length) {
             require(length >= 0 && length <= cache.length(), "a sequence begins with what another one has");
             require(!cache.overflowed(), "what overflowed is not shared");
             return cache.fork(length).release();
           },
           "length"_a, nb::rv_policy::take_ownership)
      .def("reserve", &SequenceCache::reserve, "length"_a);
  nb::class_<BoundDecoder>(module, "Decoder")
      .def("__init__",
           [](BoundDecoder* self, std::vector<int32_t> widths, const Layers& layers, const Rotaries& rotaries,
              std::vector<std::shared_ptr<BoundStep>> steps, int32_t output, std::shared_ptr<LinearArrays> head, int threads) {
             const int32_t vocabulary = head->matrix->weight().rows;
             new (self) BoundDecoder(shape_of(std::move(widths), layers, rotaries, vocabulary), std::move(steps), output,
                                     std::move(head), threads);
           },
           "widths"_a, "layers"_a, "rotaries"_a, "steps"_a, "output"_a, "head"_a, "threads"_a = 0)
      .def_prop_ro("threads", [](BoundDecoder& self) { return self.decoder().pool().threads(); })
      .def("page_bytes",
           [](BoundDecoder& self, const std::string& precision) {
             return KeyValuePool::page_bytes(self.cache_shape(precision_of(precision)));
           },
           "precision"_a)
      .def("pool",
           [](BoundDecoder& self, int64_t pages, const std::string& precision, bool transformed) {
             require(pages > 0, "a pool has at least one page");
             return std::make_shared<KeyValuePool>(self.cache_shape(precision_of(precision), transformed), pages);
           },
           "pages"_a, "precision"_a, "transformed"_a = true)
      .def("program", &program, "context"_a, "switch_length"_a)
      .def("feed", &BoundDecoder::feed, "caches"_a, "counts"_a, "tokens"_a, "all"_a)
      .def("read", &BoundDecoder::read, "caches"_a, "counts"_a, "tokens"_a, "wanted"_a, "hidden"_a = false);
  module.def("likeliest", [](Floats logits) { return likeliest(logits.data(), static_cast<int32_t>(logits.size())); },
             "logits"_a);
  module.def("sample",
             [](Floats logits, double temperature, int32_t top_k, double top_p, double place) {
               return sample(logits.data(), static_cast<int32_t>(logits.size()), temperature, top_k, top_p, place);
             },
             "logits"_a, "temperature"_a, "top_k"_a, "top_p"_a, "place"_a);
}
