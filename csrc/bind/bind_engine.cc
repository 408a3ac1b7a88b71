// The decoder as Python sees it: matrices, a decoder made of them, caches, and one call a step.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <mutex>
#include <new>

#include "bind/matrix.h"
#include "engine/decoder.h"
#include "engine/sampling.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace quern {
namespace {

constexpr int32_t CHUNK = 512;  // tokens that go through the blocks together

struct LinearArrays {
  std::shared_ptr<Matrix> matrix;
  std::optional<Floats> bias;
  std::optional<Bytes> signs;
  bool fine;

  LinearArrays(std::shared_ptr<Matrix> m, std::optional<Floats> b, std::optional<Bytes> s, bool f)
      : matrix(std::move(m)), bias(std::move(b)), signs(std::move(s)), fine(f) {
    const Weight& w = matrix->weight();
    require(!bias || static_cast<int64_t>(bias->size()) == w.rows, "a bias has one number a row");
    require(!signs || static_cast<int64_t>(signs->size()) == (w.columns + 7) / 8, "signs have one bit a column");
  }

  Linear view() const {
    return {matrix->weight(), bias ? bias->data() : nullptr, signs ? signs->data() : nullptr, fine};
  }
};

struct BlockArrays {
  Floats input_norm, output_norm;
  std::optional<Floats> query_norm, key_norm;
  std::vector<std::shared_ptr<LinearArrays>> linears;  // query, key, value, output, gate, up, down
};

class BoundDecoder {
 public:
  BoundDecoder(DecoderShape shape, std::vector<std::shared_ptr<BlockArrays>> blocks, std::shared_ptr<Matrix> embedding,
               Floats final_norm, std::shared_ptr<LinearArrays> head, int threads)
      : blocks_(std::move(blocks)),
        embedding_(std::move(embedding)),
        final_norm_(std::move(final_norm)),
        head_(std::move(head)) {
    check(shape);
    std::vector<DecoderBlock> views;
    for (const auto& block : blocks_) {
      const auto at = [&](int i) { return block->linears[i]->view(); };
      views.push_back({block->input_norm.data(), block->output_norm.data(),
                       block->query_norm ? block->query_norm->data() : nullptr,
                       block->key_norm ? block->key_norm->data() : nullptr, at(0), at(1), at(2), at(3), at(4), at(5),
                       at(6)});
    }
    decoder_ = std::make_unique<Decoder>(std::move(shape), std::move(views), embedding_->weight(), final_norm_.data(),
                                         head_->view(), threads);
  }

  Decoder& decoder() { return *decoder_; }

  CacheShape cache_shape(CachePrecision precision) const {
    const DecoderShape& s = decoder_->shape();
    return {s.layers, s.key_value_heads, s.head_dim, precision};
  }

  // Tokens of several sequences, `counts[i]` of them for `caches[i]`; logits of every token or of each sequence's last.
  nb::ndarray<nb::numpy, float, nb::ndim<2>> feed(const std::vector<SequenceCache*>& caches,
                                                 const std::vector<int32_t>& counts,
                                                 Array<int32_t, nb::ndim<1>> tokens, bool all) {
    const DecoderShape& shape = decoder_->shape();
    require(!caches.empty() && caches.size() == counts.size(), "one count a sequence, and at least one");
    std::vector<Row> rows;
    std::vector<bool> wanted;
    int64_t total = 0;
    for (int32_t count : counts) {
      require(count > 0, "every sequence needs at least one token");
      total += count;
    }
    require(total == static_cast<int64_t>(tokens.size()), "the counts must add up to the number of tokens");
    for (size_t i = 0; i < caches.size(); ++i) {
      const CacheShape& cache = caches[i]->shape();
      require(cache.layers == shape.layers && cache.heads == shape.key_value_heads && cache.head_dim == shape.head_dim,
              "the sequence is one of another model");
      require(caches[i]->rotary() >= 0 && caches[i]->rotary() < static_cast<int32_t>(shape.frequencies.size()),
              "the decoder has no such set of rotary frequencies");
      require(caches[i]->bare_keys() == caches[0]->bare_keys(), "sequences of one call are all of int8 or none");
      require(std::count(caches.begin(), caches.end(), caches[i]) == 1, "a sequence is given twice");
      require(caches[i]->reserve(caches[i]->length() + static_cast<int64_t>(counts[i])),
              "the pool has room for " + std::to_string(caches[i]->room() - caches[i]->length()) + " more tokens, not " +
                  std::to_string(counts[i]));
      for (int32_t n = 0; n < counts[i]; ++n) {
        const int32_t token = tokens.data()[rows.size()];
        require(token >= 0 && token < shape.vocabulary, "token " + std::to_string(token) +
                                                            " is outside the vocabulary of " +
                                                            std::to_string(shape.vocabulary));
        rows.push_back({caches[i], caches[i]->length() + n, token});
        wanted.push_back(all || n + 1 == counts[i]);
      }
    }
    const size_t kept = static_cast<size_t>(std::count(wanted.begin(), wanted.end(), true));
    std::unique_ptr<float[]> out(new float[kept * shape.vocabulary]);
    {
      nb::gil_scoped_release released;
      std::lock_guard<std::mutex> lock(mutex_);
      std::vector<float> hidden;
      size_t written = 0;
      for (size_t from = 0; from < rows.size(); from += CHUNK) {
        const std::vector<Row> chunk(rows.begin() + from, rows.begin() + std::min(rows.size(), from + CHUNK));
        decoder_->forward(chunk, hidden);
        int32_t found = 0;
        for (size_t i = 0; i < chunk.size(); ++i)
          if (wanted[from + i]) {
            std::copy_n(hidden.begin() + i * shape.hidden, shape.hidden,
                        hidden.begin() + static_cast<int64_t>(found) * shape.hidden);
            ++found;
          }
        if (found > 0) decoder_->logits(hidden.data(), found, out.get() + written * shape.vocabulary);
        written += found;
      }
    }
    return owned(std::move(out), kept, shape.vocabulary);
  }

 private:
  void check(const DecoderShape& s) const {
    require(static_cast<int64_t>(blocks_.size()) == s.layers, "one block a layer");
    require(s.heads > 0 && s.key_value_heads > 0 && s.heads % s.key_value_heads == 0,
            "query heads must be a multiple of key/value heads");
    require(s.head_dim > 0 && s.head_dim % 2 == 0, "head_dim must be even");
    require(!s.frequencies.empty(), "at least one set of rotary frequencies");
    for (const auto& frequencies : s.frequencies)
      require(static_cast<int64_t>(frequencies.size()) == s.head_dim / 2, "one rotary frequency for two channels");
    require(static_cast<int64_t>(s.windows.size()) == s.layers, "one window a layer");
    for (const int32_t window : s.windows) require(window >= 0, "a window has at least one position, or is 0 for all");
    const int32_t query = s.heads * s.head_dim, key = s.key_value_heads * s.head_dim;
    const int32_t rows[] = {query, key, key, s.hidden, s.intermediate, s.intermediate, s.hidden};
    const int32_t columns[] = {s.hidden, s.hidden, s.hidden, query, s.hidden, s.hidden, s.intermediate};
    for (const auto& block : blocks_) {
      require(block->linears.size() == 7, "a block has seven linears");
      for (int i = 0; i < 7; ++i) {
        const Weight& w = block->linears[i]->matrix->weight();
        require(w.rows == rows[i] && w.columns == columns[i], "a linear of a block has a shape that the config denies");
      }
      require(static_cast<int64_t>(block->input_norm.size()) == s.hidden &&
                  static_cast<int64_t>(block->output_norm.size()) == s.hidden,
              "a norm has one weight a hidden channel");
      for (const auto& norm : {block->query_norm, block->key_norm})
        require(!norm || static_cast<int64_t>(norm->size()) == s.head_dim, "a head's norm has head_dim weights");
    }
    const Weight &e = embedding_->weight(), &h = head_->matrix->weight();
    require(e.rows == s.vocabulary && e.columns == s.hidden && h.rows == s.vocabulary && h.columns == s.hidden,
            "embedding and head are vocabulary x hidden");
    require(static_cast<int64_t>(final_norm_.size()) == s.hidden, "a norm has one weight a hidden channel");
  }

  std::vector<std::shared_ptr<BlockArrays>> blocks_;
  std::shared_ptr<Matrix> embedding_;
  Floats final_norm_;
  std::shared_ptr<LinearArrays> head_;
  std::unique_ptr<Decoder> decoder_;
  std::mutex mutex_;
};

CachePrecision precision_of(const std::string& name) {
  if (name == "int8") return CachePrecision::int8;
  if (name == "float16") return CachePrecision::float16;
  if (name == "float32") return CachePrecision::float32;
  throw std::invalid_argument("unknown cache precision '" + name + "'; known: int8, float16, float32");
}

Activation activation_of(const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  throw std::invalid_argument("unknown activation '" + name + "'; known: silu, gelu, gelu_tanh");
}

DecoderShape shape_of(const nb::dict& values) {
  const auto get = [&](const char* key) { return nb::cast<int32_t>(values[key]); };
  DecoderShape s;
  s.hidden = get("hidden");
  s.intermediate = get("intermediate");
  s.layers = get("layers");
  s.heads = get("heads");
  s.key_value_heads = get("key_value_heads");
  s.head_dim = get("head_dim");
  s.vocabulary = get("vocabulary");
  s.windows = nb::cast<std::vector<int32_t>>(values["windows"]);
  s.activation = activation_of(nb::cast<std::string>(values["activation"]));
  s.epsilon = nb::cast<float>(values["epsilon"]);
  s.rotary_factor = nb::cast<float>(values["rotary_factor"]);
  s.frequencies = nb::cast<std::vector<std::vector<float>>>(values["frequencies"]);
  return s;
}

}  // namespace
}  // namespace quern

void bind_engine(nb::module_& module) {
  using namespace quern;
  nb::class_<Matrix>(module, "Matrix")
      .def(nb::init<const std::string&, int32_t, int32_t, Bytes, std::optional<Bytes>, const std::string&,
                    std::optional<int32_t>, bool, std::optional<Bytes>, std::optional<Array<int8_t, nb::ndim<1>>>,
                    int32_t, int32_t, int32_t, int32_t>(),
           "kind"_a, "rows"_a, "columns"_a, "codes"_a, "scale"_a = nb::none(), "scale_type"_a = "float16",
           "group"_a = nb::none(), "one_scale"_a = false, "zeros"_a = nb::none(), "table"_a = nb::none(), "bits"_a = 0,
           "window"_a = 0, "tables"_a = 1, "lag"_a = 0)
      .def_prop_ro("bytes", &Matrix::bytes);
  nb::class_<LinearArrays>(module, "Linear")
      .def(nb::init<std::shared_ptr<Matrix>, std::optional<Floats>, std::optional<Bytes>, bool>(), "matrix"_a,
           "bias"_a = nb::none(), "signs"_a = nb::none(), "fine"_a = false);
  nb::class_<BlockArrays>(module, "Block")
      .def("__init__",
           [](BlockArrays* self, Floats input_norm, Floats output_norm, std::optional<Floats> query_norm,
              std::optional<Floats> key_norm, std::vector<std::shared_ptr<LinearArrays>> linears) {
             new (self) BlockArrays{std::move(input_norm), std::move(output_norm), std::move(query_norm),
                                    std::move(key_norm), std::move(linears)};
           },
           "input_norm"_a, "output_norm"_a, "query_norm"_a.none(), "key_norm"_a.none(), "linears"_a);
  module.attr("CACHE_BLOCK") = BLOCK;
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
      .def("reserve", &SequenceCache::reserve, "length"_a);
  nb::class_<BoundDecoder>(module, "Decoder")
      .def("__init__",
           [](BoundDecoder* self, const nb::dict& shape, std::vector<std::shared_ptr<BlockArrays>> blocks,
              std::shared_ptr<Matrix> embedding, Floats final_norm, std::shared_ptr<LinearArrays> head, int threads) {
             new (self) BoundDecoder(shape_of(shape), std::move(blocks), std::move(embedding), std::move(final_norm),
                                     std::move(head), threads);
           },
           "shape"_a, "blocks"_a, "embedding"_a, "final_norm"_a, "head"_a, "threads"_a = 0)
      .def_prop_ro("threads", [](BoundDecoder& self) { return self.decoder().pool().threads(); })
      .def("page_bytes",
           [](BoundDecoder& self, const std::string& precision) {
             return KeyValuePool::page_bytes(self.cache_shape(precision_of(precision)));
           },
           "precision"_a)
      .def("pool",
           [](BoundDecoder& self, int64_t pages, const std::string& precision) {
             require(pages > 0, "a pool has at least one page");
             return std::make_shared<KeyValuePool>(self.cache_shape(precision_of(precision)), pages);
           },
           "pages"_a, "precision"_a)
      .def("feed", &BoundDecoder::feed, "caches"_a, "counts"_a, "tokens"_a, "all"_a);
  module.def("likeliest", [](Floats logits) { return likeliest(logits.data(), static_cast<int32_t>(logits.size())); },
             "logits"_a);
  module.def("sample",
             [](Floats logits, double temperature, int32_t top_k, double top_p, double place) {
               return sample(logits.data(), static_cast<int32_t>(logits.size()), temperature, top_k, top_p, place);
             },
             "logits"_a, "temperature"_a, "top_k"_a, "top_p"_a, "place"_a);
}
