// Many tokens: a thread decodes a panel of weights into its cache and multiplies it by all of its tokens, so the cost of
// decoding is shared by them.
#include <algorithm>
#include <cstring>

#include "kernels/products.h"
#include "kernels/scratch.h"

namespace quern {
namespace {

constexpr int32_t MOST_TOKENS = 512;   // of a piece: its sums are 512 KiB
constexpr int32_t LEAST_TOKENS = 64;   // below, decoding costs as much as multiplying
constexpr int64_t PIECES_A_THREAD = 4;
constexpr int32_t PAD = 16;            // registers of a panel are filled up to this many: 64 columns, a matrix tile

struct Memory {
  Scratch panel, sums, outputs, scales;
};

class PanelJob : public Job {
 public:
  PanelJob(const Product& product, const Activations& activations, int threads)
      : weight_(*product.weight), summands_(summands(weight_)), a_(activations), outputs_(product.outputs) {
    row_blocks_ = ceil_divide(weight_.rows, TILE_ROWS);
    groups_ = static_cast<int32_t>(ceil_divide(a_.columns, a_.group));
    const int64_t parts = ceil_divide(threads == 1 ? 1 : threads * PIECES_A_THREAD, row_blocks_);
    const int64_t tokens = ceil_divide(ceil_divide(a_.tokens, parts), 32) * 32;
    tokens_ = static_cast<int32_t>(std::clamp<int64_t>(tokens, LEAST_TOKENS, MOST_TOKENS));
  }

  int64_t pieces() const override { return row_blocks_ * ceil_divide(a_.tokens, tokens_); }

  void compute(int64_t piece) override {
    static thread_local Memory memory;
    Piece p(*this, piece, memory);
    p.compute();
  }

 private:
  // Some rows times some tokens.
  struct Piece {
    const PanelJob& job;
    const Kernels& k = kernels();
    int32_t first_row, rows, row_groups, first_token, tokens;
    int64_t cells;      // of one array of sums or outputs
    int8_t* panel;
    int32_t* sums;      // (row_groups, tokens, 16)
    float* outputs;     // the same
    float* ws;          // (groups, TILE_ROWS)

    Piece(const PanelJob& j, int64_t piece, Memory& memory) : job(j) {
      first_row = static_cast<int32_t>(piece % job.row_blocks_) * TILE_ROWS;
      first_token = static_cast<int32_t>(piece / job.row_blocks_) * job.tokens_;
      rows = std::min(job.weight_.rows - first_row, TILE_ROWS);
      row_groups = (rows + 15) / 16;
      tokens = std::min(job.a_.tokens - first_token, job.tokens_);
      cells = static_cast<int64_t>(row_groups) * tokens * 16;
      panel = memory.panel.get<int8_t>(TILE_ROWS * (PANEL_COLUMNS + 4 * PAD));
      sums = memory.sums.get<int32_t>(cells);
      outputs = memory.outputs.get<float>(cells);
      ws = memory.scales.get<float>(static_cast<int64_t>(job.groups_) * TILE_ROWS);
    }

    const int8_t* values(int32_t column) const { return job.a_.values.data() + first_token * job.a_.stride + column; }
    const float* xs(int32_t group) const { return job.a_.scale.data() + static_cast<int64_t>(first_token) * job.groups_ + group; }
    const int32_t* xsum(int32_t group) const {
      return job.a_.sums.data() + static_cast<int64_t>(first_token) * job.groups_ + group;
    }

    void load_scales() {
      memset(ws, 0, sizeof(float) * job.groups_ * TILE_ROWS);
      float line[64];
      for (int32_t row = 0; row < rows; ++row)
        for (int32_t g = 0; g < job.groups_; g += 64) {
          const int32_t count = std::min(64, job.groups_ - g);
          k.scales(job.weight_, first_row + row, g, count, line);
          for (int32_t i = 0; i < count; ++i) ws[static_cast<int64_t>(g + i) * TILE_ROWS + row] = line[i];
        }
    }

    // Decode columns and fill up with zero bytes, which add nothing however they are read, to whole matrix tiles; returns
    // the registers of 16 rows.
    int32_t decode(const Weight& weight, int32_t first_column, int32_t columns) {
      const int32_t full = (columns + 3) / 4, blocks = static_cast<int32_t>(ceil_divide(full, PAD) * PAD);
      const auto decoder = weight.kind == Kind::trellis ? k.decode_trellis : k.decode_rows;
      decoder(weight, {first_row, rows, first_column, columns, blocks}, k.flip, panel);
      for (int32_t g = 0; full < blocks && g < row_groups; ++g)
        memset(panel + (static_cast<int64_t>(g) * blocks + full) * LANES, 0, (blocks - full) * LANES);
      return blocks;
    }

    // One group of any size.
    void add_group(int32_t group) {
      const int32_t end = std::min((group + 1) * job.a_.group, job.a_.columns);
      memset(sums, 0, sizeof(int32_t) * cells);
      for (int32_t column = group * job.a_.group; column < end; column += PANEL_COLUMNS) {
        const int32_t columns = std::min<int32_t>(end - column, PANEL_COLUMNS);
        for (int32_t s = 0; s < job.summands_.count; ++s) {
          const int32_t blocks = decode(job.summands_.weights[s], column, columns);
          k.panel(panel, row_groups, blocks, values(column), job.a_.stride, tokens, sums);
        }
      }
      k.flush(sums, row_groups, tokens, ws + static_cast<int64_t>(group) * TILE_ROWS, xs(group), xsum(group), job.groups_,
              flips(), outputs);
    }

    // Groups from `group` on, as many as fit a panel; how many.
    int32_t add_groups(int32_t group) {
      const int32_t size = job.a_.group, whole = job.a_.columns / size;
      const int32_t count = std::min(static_cast<int32_t>(PANEL_COLUMNS) / size, whole - group);
      const int32_t blocks = decode(job.weight_, group * size, count * size);
      k.grouped(panel, row_groups, blocks, size, count, values(group * size), job.a_.stride, tokens,
                ws + static_cast<int64_t>(group) * TILE_ROWS, xs(group), xsum(group), job.groups_, outputs);
      return count;
    }

    int32_t flips() const { return k.flip * job.summands_.count; }

    void compute() {
      load_scales();
      memset(outputs, 0, sizeof(float) * cells);
      const int32_t size = job.a_.group;
      const bool small = k.grouped != nullptr && size % 32 == 0 && size <= PANEL_COLUMNS && job.groups_ > 1;
      for (int32_t group = 0; group < job.groups_;) {
        if (small && (group + 1) * size <= job.a_.columns) {
          group += add_groups(group);
        } else {
          add_group(group++);
        }
      }
      store();
    }

    // Token by token, so that what is written lies together.
    void store() const {
      for (int32_t t = 0; t < tokens; ++t) {
        float* to = job.outputs_ + static_cast<int64_t>(first_token + t) * job.weight_.rows + first_row;
        const float* from = outputs + static_cast<int64_t>(t) * 16;
        const int64_t step = static_cast<int64_t>(tokens) * 16;
        int32_t g = 0;
        for (; g < rows / 16; ++g) memcpy(to + 16 * g, from + g * step, sizeof(float) * 16);
        if (rows % 16 != 0) memcpy(to + 16 * g, from + g * step, sizeof(float) * (rows % 16));
      }
    }
  };

  const Weight& weight_;
  const Summands summands_;
  const Activations& a_;
  float* outputs_;
  int64_t row_blocks_;
  int32_t groups_, tokens_;
};

}  // namespace

bool has_panels(const Weight& weight) {
  return !is_plain(weight) && (groups_of(weight) == 1 || activation_group(weight) % 4 == 0);
}

Job* panel_job(const Product& product, const Activations& activations, int threads) {
  return new PanelJob(product, activations, threads);
}

}  // namespace quern
