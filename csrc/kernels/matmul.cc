#include "kernels/matmul.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <deque>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>

#include "kernels/products.h"
#include "kernels/scratch.h"

namespace quern {
namespace {

// Codes that a thread takes at once. At the start of a piece nothing has been fetched ahead, neither codes nor scales: two
// threads on a Xeon read 4-bit groups of 64 at .72 of memory's speed in pieces of 128 KiB, at .82 in pieces of 1 MiB.
constexpr int64_t PIECE_BYTES = 1 << 20;
constexpr int64_t PIECES_A_THREAD = 4;      // where there are so many, so that no thread waits long for another
constexpr int64_t FEW_PRODUCTS = 4;
constexpr int32_t PANEL_BLOCKS = 32;        // registers of 16 rows decoded at once for few tokens: 32 KiB, the L1 cache
constexpr int64_t SERIAL = 1 << 15;         // elements for which waking threads costs more than it gains

// Row kernels over ranges of rows: every kind whose codes lie in rows, for few tokens; and what has no panels, for many.
class RowJob : public Job {
 public:
  RowJob(const Product& product, int64_t wanted) : weight_(*product.weight), inputs_(product.inputs), outputs_(product.outputs) {
    const int64_t balanced = ceil_divide(weight_.rows, wanted);
    const int64_t rows = std::min(balanced, std::max<int64_t>(PIECE_BYTES / weight_.row_bytes, 1));
    rows_ = static_cast<int32_t>(ceil_divide(rows, 16) * 16);
  }

  int64_t pieces() const override { return ceil_divide(weight_.rows, rows_); }

  void compute(int64_t piece) override {
    const int32_t first = static_cast<int32_t>(piece) * rows_, last = std::min(first + rows_, weight_.rows);
    for (int32_t t = 0; t < inputs_.tokens; t += MANY_TOKENS) {
      const Inputs inputs = view(weight_, *inputs_.of, inputs_.first + t, std::min(MANY_TOKENS, inputs_.tokens - t));
      multiply_rows(weight_, inputs, first, last, outputs_ + static_cast<int64_t>(t) * weight_.rows);
    }
  }

 private:
  const Weight& weight_;
  const Slice inputs_;
  float* outputs_;
  int32_t rows_;
};

// Codes in tiles and few tokens. A piece is a tile, or where there are few tiles a part of its columns; whoever is last with a
// tile adds the parts' sums (integers, so the order does not matter) and scales them.
class TileJob : public Job {
 public:
  TileJob(const Product& product, int64_t wanted, Scratch& memory)
      : weight_(*product.weight),
        summands_(summands(weight_)),
        activations_(*product.inputs.of),
        begin_(product.inputs.first),
        tokens_(product.inputs.tokens),
        outputs_(product.outputs) {
    tiles_ = static_cast<int32_t>(ceil_divide(weight_.rows, TILE_ROWS));
    blocks_ = (weight_.columns + 3) / 4;
    const int64_t parts = ceil_divide(wanted, tiles_);
    const int64_t possible = ceil_divide(blocks_, 8 * PANEL_BLOCKS);
    part_blocks_ = static_cast<int32_t>(ceil_divide(ceil_divide(blocks_, std::min(parts, possible)), 16) * 16);
    parts_ = static_cast<int32_t>(ceil_divide(blocks_, part_blocks_));
    tile_sums_ = static_cast<int64_t>(TILE_ROWS) * tokens_;
    sums_ = memory.get<int32_t>(pieces() * tile_sums_);
    left_.reset(new std::atomic<int32_t>[tiles_]);
    for (int32_t tile = 0; tile < tiles_; ++tile) left_[tile].store(shares(), std::memory_order_relaxed);
  }

  int64_t pieces() const override { return static_cast<int64_t>(tiles_) * shares(); }

  void compute(int64_t piece) override {
    const int32_t tile = static_cast<int32_t>(piece / shares()), share = static_cast<int32_t>(piece % shares());
    const int32_t first = share / summands_.count * part_blocks_, last = std::min(first + part_blocks_, blocks_);
    const Weight& summand = summands_.weights[share % summands_.count];
    int32_t* sums = sums_ + piece * tile_sums_;
    if (tokens_ == 1) {
      kernels_of(summand, kernels().level).tile(summand, tile, first, last, values(), sums);
    } else {
      add_panels(summand, tile, first, last, sums);
    }
    if (left_[tile].fetch_sub(1) == 1) finish(tile);
  }

 private:
  int32_t shares() const { return parts_ * summands_.count; }
  const int8_t* values() const { return activations_.values.data() + begin_ * activations_.stride; }
  int32_t height(int32_t tile) const { return std::min(weight_.rows - tile * TILE_ROWS, TILE_ROWS); }

  void add_panels(const Weight& summand, int32_t tile, int32_t first, int32_t last, int32_t* sums) const {
    const Kernels& k = kernels();
    const int32_t row_groups = (height(tile) + 15) / 16;
    alignas(64) int8_t panel[TILE_ROWS * 4 * PANEL_BLOCKS];
    memset(sums, 0, sizeof(int32_t) * tile_sums_);
    for (int32_t block = first; block < last; block += PANEL_BLOCKS) {
      const int32_t count = std::min(PANEL_BLOCKS, last - block);
      kernels_of(summand, k.level).panel(summand, {tile * TILE_ROWS, height(tile), 4 * block, 4 * count, count}, k.flip, panel);
      k.panel(panel, row_groups, count, values() + 4 * block, activations_.stride, tokens_, sums);
    }
  }

  void finish(int32_t tile) {
    const Kernels& k = kernels();
    const int32_t tokens = tokens_, rows = height(tile), row_groups = (rows + 15) / 16;
    int32_t* total = sums_ + static_cast<int64_t>(tile) * shares() * tile_sums_;
    for (int32_t share = 1; share < shares(); ++share) {
      const int32_t* more = total + share * tile_sums_;
      for (int64_t i = 0; i < static_cast<int64_t>(row_groups) * 16 * tokens; ++i)
        total[i] = static_cast<int32_t>(static_cast<uint32_t>(total[i]) + static_cast<uint32_t>(more[i]));
    }
    float ws[TILE_ROWS] = {};
    float outputs[TILE_ROWS * MANY_TOKENS] = {};
    if (weight_.scale_stride == 1) {  // one after the other, as if they were a row's
      k.scales(weight_, tile * TILE_ROWS, 0, rows, ws);
    } else {
      for (int32_t row = 0; row < rows; ++row) k.scales(weight_, tile * TILE_ROWS + row, 0, 1, ws + row);
    }
    const int32_t flips = tokens == 1 ? 0 : k.flip * summands_.count;  // every summand was decoded with its bytes flipped
    k.flush(total, row_groups, tokens, ws, activations_.scale.data() + begin_, activations_.sums.data() + begin_, 1, flips,
            outputs);
    for (int32_t t = 0; t < tokens; ++t)
      for (int32_t row = 0; row < rows; row += 16)
        memcpy(outputs_ + static_cast<int64_t>(t) * weight_.rows + tile * TILE_ROWS + row, outputs + (row * tokens + t * 16),
               sizeof(float) * std::min(16, rows - row));
  }

  const Weight& weight_;
  const Summands summands_;
  const Activations& activations_;
  int32_t begin_, tokens_;
  float* outputs_;
  int32_t tiles_, blocks_, part_blocks_, parts_;
  int64_t tile_sums_;
  int32_t* sums_;
  std::unique_ptr<std::atomic<int32_t>[]> left_;
};

// function(row) for every row of some columns: by threads where that pays.
template <typename Function>
void each_row(ThreadPool& pool, int64_t rows, int64_t columns, Function&& function) {
  if (rows * columns > SERIAL) return pool.each(rows, function);
  for (int64_t row = 0; row < rows; ++row) function(row);
}

void check(const Weight& weight, const Activations& activations) {
  const bool fits = weight.columns == activations.columns && activation_group(weight) == activations.group;
  if (!fits || weight.columns > MAX_COLUMNS)
    throw std::invalid_argument("a matrix of " + std::to_string(weight.columns) + " columns in groups of " +
                                std::to_string(activation_group(weight)) + " cannot take inputs of " +
                                std::to_string(activations.columns) + " columns in groups of " +
                                std::to_string(activations.group) + "; the limit is " + std::to_string(MAX_COLUMNS));
  if (weight.kind->plain && activations.exact == nullptr)
    throw std::invalid_argument("a plain matrix needs its inputs as they were, not quantized");
}

}  // namespace

int64_t code_bytes(const Weight& weight) {
  return weight.kind->tiled() ? weight.kind->tile_bytes(weight) : static_cast<int64_t>(weight.rows) * weight.row_bytes;
}

int32_t activation_group(const Weight& weight) {
  return weight.kind->plain || weight.kind->tiled() ? weight.columns : weight.group;
}

Summands summands(const Weight& weight) {
  Summands found{1, {weight, weight}};
  if (weight.tables != 2) return found;
  const int32_t size = 1 << weight.window;
  const auto first = std::minmax_element(weight.table, weight.table + size);
  const auto second = std::minmax_element(weight.table + size, weight.table + 2 * size);
  if (*first.first + *second.first >= -128 && *first.second + *second.second <= 127) return found;
  found.count = 2;
  for (Weight& w : found.weights) w.tables = 1;
  found.weights[0].lag = 0;
  found.weights[1].table = weight.table + size;
  return found;
}

Inputs view(const Weight& weight, const Activations& a, int32_t first_token, int32_t tokens) {
  const int32_t groups = groups_of(weight);
  const int64_t t = first_token;
  return {tokens, a.columns, weight.group, groups, a.values.data() + t * a.stride, a.stride, a.halves.data() + 2 * t * a.half,
          a.half, a.quarters.data() + 2 * t * a.half, a.half / 2, a.scale.data() + t * groups, a.sums.data() + t * groups,
          a.exact ? a.exact + t * a.columns : nullptr, weight.rows};
}

void multiply_rows(const Weight& weight, const Inputs& inputs, int32_t first, int32_t last, float* outputs) {
  // 4-bit groups that do not begin on a byte are rare enough for the scalar version.
  const bool bytes = inputs.groups == 1 || inputs.group % 2 == 0;
  kernels_of(weight, bytes ? kernels().level : 0).rows(weight, inputs, first, last, outputs);
}

void quantize(ThreadPool& pool, const float* inputs, int32_t tokens, int32_t columns, int32_t group, Activations& out,
              InputScale from, bool for_few) {
  const int64_t groups = ceil_divide(columns, group);
  out.tokens = tokens;
  out.columns = columns;
  out.group = group;
  out.exact = inputs;
  out.half = ceil_divide(columns, 256) * 128;
  out.stride = 2 * out.half + 64;
  out.values.resize(tokens * out.stride);
  out.scale.resize(tokens * groups);
  out.sums.resize(tokens * groups);
  const bool rows = for_few || tokens <= most_row_tokens(kernels().level) || (group % 4 != 0 && groups > 1);
  out.halves.resize(rows ? tokens * 2 * out.half : 0);
  out.quarters.resize(rows ? tokens * 2 * out.half : 0);
  const Kernels& k = kernels();
  const auto one = [&](int64_t t) {
    int8_t* values = out.values.data() + t * out.stride;
    float* scale = out.scale.data() + t * groups;
    int32_t* sums = out.sums.data() + t * groups;
    if (from.whole && groups > 1) {
      k.quantize(inputs + t * columns, columns, columns, from.given, values, scale, sums);
      std::fill(scale + 1, scale + groups, scale[0]);
      for (int64_t g = 0; g < groups; ++g)
        sums[g] = std::accumulate(values + g * group, values + std::min<int64_t>((g + 1) * group, columns), int32_t{0});
    } else {
      k.quantize(inputs + t * columns, columns, group, from.given, values, scale, sums);
    }
    memset(values + columns, 0, out.stride - columns);
    int8_t* even = out.halves.data() + 2 * t * out.half;
    if (!rows) return;
    k.split(values, 2 * out.half, even, even + out.half);
    int8_t* first = out.quarters.data() + 2 * t * out.half;
    const int64_t quarter = out.half / 2;
    k.split(even, out.half, first, first + 2 * quarter);
    k.split(even + out.half, out.half, first + quarter, first + 3 * quarter);
  };
  each_row(pool, tokens, columns, one);
}

void gather(ThreadPool& pool, const Activations& from, const std::vector<int32_t>& tokens, Activations& out) {
  const int64_t count = static_cast<int64_t>(tokens.size()), groups = ceil_divide(from.columns, from.group);
  out.tokens = static_cast<int32_t>(count);
  out.columns = from.columns;
  out.group = from.group;
  out.stride = from.stride;
  out.half = from.half;
  out.values.resize(count * out.stride);
  out.halves.resize(count * 2 * out.half);
  out.quarters.resize(count * 2 * out.half);
  out.scale.resize(count * groups);
  out.sums.resize(count * groups);
  const auto one = [&](int64_t i) {
    const int64_t t = tokens[i];
    memcpy(out.values.data() + i * out.stride, from.values.data() + t * out.stride, out.stride);
    memcpy(out.halves.data() + 2 * i * out.half, from.halves.data() + 2 * t * out.half, 2 * out.half);
    memcpy(out.quarters.data() + 2 * i * out.half, from.quarters.data() + 2 * t * out.half, 2 * out.half);
    memcpy(out.scale.data() + i * groups, from.scale.data() + t * groups, sizeof(float) * groups);
    memcpy(out.sums.data() + i * groups, from.sums.data() + t * groups, sizeof(int32_t) * groups);
  };
  each_row(pool, count, from.columns, one);
}

void multiply(ThreadPool& pool, const std::vector<Product>& products) {
  for (const Product& product : products) check(*product.weight, *product.inputs.of);
  static thread_local std::deque<Scratch> memory;  // one a product
  while (memory.size() < products.size()) memory.emplace_back();
  // Few products are cut for all threads each; of many, each is a share of the work.
  const int64_t many = static_cast<int64_t>(products.size()) > FEW_PRODUCTS ? static_cast<int64_t>(products.size()) : 1;
  const int64_t wanted = ceil_divide(pool.threads() * PIECES_A_THREAD, many), alone = pool.threads() == 1 ? 1 : wanted;
  std::vector<std::unique_ptr<Job>> jobs;
  std::vector<int64_t> ends;
  for (const Product& product : products) {
    if (product.inputs.tokens <= 0) continue;
    if (product.inputs.tokens > row_tokens(*product.weight, kernels().level) && has_panels(*product.weight)) {
      jobs.emplace_back(panel_job(product, alone));
    } else if (product.weight->kind->tiled()) {
      jobs.push_back(std::make_unique<TileJob>(product, alone, memory[jobs.size()]));
    } else {
      jobs.push_back(std::make_unique<RowJob>(product, wanted));
    }
    ends.push_back((ends.empty() ? 0 : ends.back()) + jobs.back()->pieces());
  }
  if (jobs.empty()) return;
  pool.each(ends.back(), [&](int64_t piece) {
    const size_t at = std::upper_bound(ends.begin(), ends.end(), piece) - ends.begin();
    jobs[at]->compute(piece - (at == 0 ? 0 : ends[at - 1]));
  });
}

void multiply(ThreadPool& pool, std::vector<Product> products, const Activations& activations) {
  for (Product& product : products) product.inputs = {&activations, 0, activations.tokens};
  multiply(pool, products);
}

void rotate_row(float* values, int32_t columns, const uint8_t* signs) {
  kernels().rotate(values, columns, columns & -columns, signs);
}

void rotate(ThreadPool& pool, float* values, int32_t tokens, int32_t columns, const uint8_t* signs) {
  each_row(pool, tokens, columns, [&](int64_t t) { rotate_row(values + t * columns, columns, signs); });
}

}  // namespace quern
