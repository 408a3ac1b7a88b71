// How a product is cut into pieces; shared by the ways to compute one.
#pragma once

#include <vector>

#include "kernels/kind.h"
#include "kernels/matmul.h"

namespace quern {

constexpr int64_t PANEL_COLUMNS = 512;  // columns decoded at once for many tokens: 256 KiB, half of a small L2 cache

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int32_t groups_of(const Weight& weight) {
  return static_cast<int32_t>(ceil_divide(weight.columns, weight.group));
}

// Tiles: weights with the same codes whose values, each of which fits int8, add up to `weight`'s. One where the sums of
// both tables fit, which is what tables should be trained for; else one a table, the second with its lag.
struct Summands {
  int32_t count;
  Weight weights[2];
};
Summands summands(const Weight& weight);

// A product as a number of pieces that threads may compute in any order.
class Job {
 public:
  virtual ~Job() = default;
  virtual int64_t pieces() const = 0;
  virtual void compute(int64_t piece) = 0;
};

// The rows that `inputs` tells of, by the row kernel of the weight's kind.
void multiply_rows(const Weight& weight, const Inputs& inputs, int32_t first, int32_t last, float* outputs);
Inputs view(const Weight& weight, const Activations& activations, int32_t first_token, int32_t tokens);

// Whether the weight's groups can be cut into registers of 4 columns.
bool has_panels(const Weight& weight);

// `wanted`: into how many pieces it should be cut, at least.
Job* panel_job(const Product& product, int64_t wanted);

}  // namespace quern
