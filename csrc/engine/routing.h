// Blocks that send each token to a few of many gated MLPs (Shazeer et al. 2017, arXiv 1701.06538).
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "engine/steps.h"

namespace quern {

// down(f(gate(x)) * up(x))
struct GatedMlp {
  Linear gate, up, down;
};

// How a router's scores become weights: softmax of all, of which the `per_token` greatest stay; the lowest of equals first.
struct Router {
  int32_t per_token;
  bool renormalize;  // those that stay are divided by their sum
};

// What a token was sent to: its experts, rising, and the weight of each.
void choose_experts(const Operations& operations, const Router& router, float* scores, int32_t experts, int32_t* chosen,
                    float* weights);

// Buffers of a routed step. Those of experts have room for all that a token meets, one behind the other.
struct RoutedPlaces {
  int32_t from, scores;     // what experts read; the router's scores, which are overwritten
  int32_t gate, up, made;   // per_token times an expert's inner width; the same; per_token times the width
  int32_t to;
};

// The same of a shared expert, and where its score lies.
struct SharedPlaces {
  int32_t score;
  int32_t gate, up, made;
};

// to = the sum over a token's experts, rising, of weight * expert(from); then, where there is a shared one, + sigmoid(score) * shared(from).
// Tokens are sorted by expert, so that the matrices of an expert are read once for all of them; gates and ups of all experts are
// one piece of parallel work, and all downs another one.
struct Routed : Step {
  Routed(RoutedPlaces places, Router router, Activation activation, std::vector<GatedMlp> experts,
         std::optional<SharedPlaces> shared_places, std::optional<GatedMlp> shared)
      : places(places),
        router(router),
        activation(activation),
        experts(std::move(experts)),
        shared_places(shared_places),
        shared(std::move(shared)) {}
  void check(const DecoderShape& shape) const override;
  bool by_row() const override { return false; }
  void run(const Batch& batch) const override;

  RoutedPlaces places;
  Router router;
  Activation activation;
  std::vector<GatedMlp> experts;
  std::optional<SharedPlaces> shared_places;
  std::optional<GatedMlp> shared;
};

}  // namespace quern
