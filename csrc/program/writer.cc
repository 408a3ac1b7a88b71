#include "program/writer.h"

#include <map>
#include <stdexcept>
#include <utility>

#include "engine/routing.h"
#include "kernels/kind.h"

namespace quern {
namespace {

class Writer {
 public:
  template <typename T>
  void number(T value) {
    made_.program.append(reinterpret_cast<const char*>(&value), sizeof value);
  }

  void count(size_t value) { number(static_cast<uint32_t>(value)); }

  void text(const std::string& value) {
    count(value.size());
    made_.program += value;
  }

  // What two of them share lies in the file once.
  void array(const void* data, int64_t bytes) {
    if (data == nullptr || bytes == 0) {
      number<uint64_t>(0);
      number<uint64_t>(0);
      return;
    }
    const auto [place, fresh] = places_.try_emplace({data, bytes}, end_);
    if (fresh) {
      made_.arrays.push_back({end_, {data, bytes}});
      end_ = (end_ + bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    }
    number<uint64_t>(place->second);
    number<uint64_t>(bytes);
  }

  void floats(const float* data, int64_t count) { array(data, data == nullptr ? 0 : 4 * count); }

  void weight(const Weight& w) {
    const ArrayBytes bytes = array_bytes(w);
    text(w.kind->name);
    for (const int32_t value : {w.rows, w.columns, w.group, static_cast<int32_t>(w.scale_type),
                                static_cast<int32_t>(w.scale != nullptr && w.scale_stride == 0), w.bits, w.window, w.tables, w.lag})
      number(value);
    number(w.scale_factor);
    array(w.codes, bytes.codes);
    array(w.scale, bytes.scale);
    array(w.zeros, bytes.zeros);
    array(w.table, bytes.table);
  }

  void linear(const Linear& linear) {
    weight(linear.weight);
    floats(linear.bias, linear.weight.rows);
    array(linear.signs, (linear.weight.columns + 7) / 8);
    number<uint32_t>(linear.fine);
    number(linear.input.given);
    number<uint32_t>(linear.input.whole);
  }

  void mlp(const GatedMlp& mlp) {
    for (const Linear* one : {&mlp.gate, &mlp.up, &mlp.down}) linear(*one);
  }

  void shape(const DecoderShape& shape) {
    number(shape.vocabulary);
    count(shape.widths.size());
    for (const int32_t width : shape.widths) number(width);
    count(shape.layers.size());
    for (const CacheLayer& layer : shape.layers) {
      number(layer.heads);
      number(layer.head_dim);
    }
    count(shape.rotaries.size());
    for (const RotaryShape& rotary : shape.rotaries) {
      number(rotary.factor);
      count(rotary.frequencies.size());
      count(rotary.frequencies[0].size());
      for (const auto& set : rotary.frequencies)
        for (const float frequency : set) number(frequency);
    }
  }

  void step(const Step& step) {
    if (const auto* s = dynamic_cast<const Embed*>(&step)) {
      number(StepCode::embed);
      weight(s->table);
      number(s->to);
    } else if (const auto* s = dynamic_cast<const Norm*>(&step)) {
      number(StepCode::norm);
      number(s->from);
      number(s->to);
      floats(s->weight, s->count);
      number(s->epsilon);
    } else if (const auto* s = dynamic_cast<const Project*>(&step)) {
      number(StepCode::project);
      number(s->from);
      count(s->linears.size());
      for (size_t i = 0; i < s->linears.size(); ++i) {
        linear(s->linears[i]);
        number(s->to[i]);
      }
    } else if (const auto* s = dynamic_cast<const Rotate*>(&step)) {
      number(StepCode::rotate);
      number(s->buffer);
      number(s->rotary);
      number(s->scale);
    } else if (const auto* s = dynamic_cast<const Store*>(&step)) {
      number(StepCode::store);
      for (const int32_t value : {s->layer, s->keys, s->values, s->rotary}) number(value);
      floats(s->key_bias, s->bias_size);
    } else if (const auto* s = dynamic_cast<const AttendStep*>(&step)) {
      number(StepCode::attend);
      for (const int32_t value : {s->layer, s->queries, s->to, s->window, s->rotary}) number(value);
      floats(s->key_bias, s->bias_size);
    } else if (const auto* s = dynamic_cast<const Activate*>(&step)) {
      number(StepCode::activate);
      number(static_cast<int32_t>(s->activation));
      number(s->gate);
      number(s->up);
    } else if (const auto* s = dynamic_cast<const Add*>(&step)) {
      number(StepCode::add);
      number(s->from);
      number(s->to);
    } else if (const auto* s = dynamic_cast<const Routed*>(&step)) {
      number(StepCode::routed);
      const RoutedPlaces& places = s->places;
      for (const int32_t place : {places.from, places.scores, places.gate, places.up, places.made, places.to}) number(place);
      number(s->router.per_token);
      number<uint32_t>(s->router.renormalize);
      number(static_cast<int32_t>(s->activation));
      count(s->experts.size());
      for (const GatedMlp& expert : s->experts) mlp(expert);
      number<uint32_t>(s->shared.has_value());
      if (!s->shared) return;
      const SharedPlaces& beside = *s->shared_places;
      for (const int32_t place : {beside.score, beside.gate, beside.up, beside.made}) number(place);
      mlp(*s->shared);
    } else {
      throw std::invalid_argument("run files have no such step of a decoder");
    }
  }

  Program made() && { return std::move(made_); }

 private:
  Program made_;
  std::map<std::pair<const void*, int64_t>, uint64_t> places_;
  uint64_t end_ = sizeof(Header);
};

}  // namespace

Program write_program(const Decoder& decoder, const ModelFacts& facts) {
  Writer writer;
  writer.number(facts.context);
  writer.number(facts.switch_length);
  writer.shape(decoder.shape());
  writer.count(decoder.steps().size());
  for (const auto& step : decoder.steps()) writer.step(*step);
  writer.number(decoder.output());
  writer.linear(decoder.head());
  return std::move(writer).made();
}

}  // namespace quern
