// Many tokens: a thread decodes a panel of weights into its cache and multiplies it by all of its tokens, so the cost of
// decoding is shared by them.
#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/products.h"
#include "kernels/scratch.h"

namespace quern {
namespace {

constexpr int32_t MOST_TOKENS = 512;    // of a piece: its sums are 512 KiB
constexpr int32_t LEAST_TOKENS = 64;    // below, decoding costs as much as multiplying
constexpr int32_t FEW_TOKENS = 64;      // taken through all panels of short rows: their sums are 64 KiB
constexpr int32_t SHORT_ROW = 2048;     // columns; all panels of 256 such rows fit into a cache of 1 MiB
constexpr int32_t PAD = 16;             // registers of a panel are filled up to this many: 64 columns, a matrix tile

// Columns that are decoded together: some groups with their own scales, or at most PANEL_COLUMNS of one group.
struct Columns {
  int32_t group, groups;  // groups 0: part of a group, whose sums are scaled after its last part
  int32_t first, count;
  bool opens, closes;     // the group
  const Weight* weight;   // a summand
  int32_t blocks;         // registers of 16 rows
  int8_t* panel;
};

struct Memory {
  Scratch panel, sums, outputs, scales, minimums;
  std::vector<Columns> parts;
};

class PanelJob : public Job {
 public:
  PanelJob(const Product& product, int64_t wanted)
      : weight_(*product.weight),
        summands_(summands(weight_)),
        a_(*product.inputs.of),
        begin_(product.inputs.first),
        all_tokens_(product.inputs.tokens),
        outputs_(product.outputs) {
    row_blocks_ = ceil_divide(weight_.rows, TILE_ROWS);
    groups_ = static_cast<int32_t>(ceil_divide(a_.columns, a_.group));
    const int64_t parts = ceil_divide(wanted, row_blocks_);
    const int64_t tokens = ceil_divide(ceil_divide(all_tokens_, parts), 32) * 32;
    tokens_ = static_cast<int32_t>(std::clamp<int64_t>(tokens, LEAST_TOKENS, MOST_TOKENS));
  }

  int64_t pieces() const override { return row_blocks_ * ceil_divide(all_tokens_, tokens_); }

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
    Memory& memory;
    int32_t first_row, rows, row_groups, first_token, tokens;
    float* ws;  // (groups, TILE_ROWS)
    float* minimums = nullptr;  // the same, of kinds that have them

    Piece(const PanelJob& j, int64_t piece, Memory& m) : job(j), memory(m) {
      first_row = static_cast<int32_t>(piece % job.row_blocks_) * TILE_ROWS;
      first_token = static_cast<int32_t>(piece / job.row_blocks_) * job.tokens_;
      rows = std::min(job.weight_.rows - first_row, TILE_ROWS);
      row_groups = (rows + 15) / 16;
      tokens = std::min(job.all_tokens_ - first_token, job.tokens_);
      ws = memory.scales.get<float>(static_cast<int64_t>(job.groups_) * TILE_ROWS);
      if (job.weight_.kind->minimums) minimums = memory.minimums.get<float>(static_cast<int64_t>(job.groups_) * TILE_ROWS);
    }

    void compute() {
      load_scales();
      list_parts();
      if (job.a_.columns > SHORT_ROW) {
        int8_t* panel = memory.panel.get<int8_t>(TILE_ROWS * (PANEL_COLUMNS + 4 * PAD));
        Block block(*this, first_token, tokens);
        for (Columns& part : memory.parts) {
          decode(part, panel);
          block.add(part);
        }
        block.store();
        return;
      }
      int64_t bytes = 0;
      for (const Columns& part : memory.parts) bytes += panel_bytes(part);
      int8_t* panel = memory.panel.get<int8_t>(bytes);
      for (Columns& part : memory.parts) {
        decode(part, panel);
        panel += panel_bytes(part);
      }
      for (int32_t t = 0; t < tokens; t += FEW_TOKENS) {
        Block block(*this, first_token + t, std::min(FEW_TOKENS, tokens - t));
        for (const Columns& part : memory.parts) block.add(part);
        block.store();
      }
    }

    void load_scales() {
      memset(ws, 0, sizeof(float) * job.groups_ * TILE_ROWS);
      if (const auto numbers = kernels_of(job.weight_, k.level).numbers) {
        if (minimums != nullptr) memset(minimums, 0, sizeof(float) * job.groups_ * TILE_ROWS);
        return numbers(job.weight_, first_row, rows, ws, minimums);
      }
      float line[64];
      for (int32_t row = 0; row < rows; ++row)
        for (int32_t g = 0; g < job.groups_; g += 64) {
          const int32_t count = std::min(64, job.groups_ - g);
          k.scales(job.weight_, first_row + row, g, count, line);
          for (int32_t i = 0; i < count; ++i) ws[static_cast<int64_t>(g + i) * TILE_ROWS + row] = line[i];
        }
    }

    // Small groups as many at once as fit a panel; one of any other size alone.
    void list_parts() {
      memory.parts.clear();
      const int32_t size = job.a_.group, columns = job.a_.columns;
      const bool small = k.grouped != nullptr && size % 16 == 0 && size <= PANEL_COLUMNS && job.groups_ > 1;
      for (int32_t group = 0; group < job.groups_;) {
        const int32_t first = group * size, whole = columns / size - group;
        if (small && whole > 0) {
          const int32_t count = std::min(static_cast<int32_t>(PANEL_COLUMNS) / size, whole);
          memory.parts.push_back({group, count, first, count * size, true, true, &job.weight_, 0, nullptr});
          group += count;
          continue;
        }
        const int32_t end = std::min(first + size, columns);
        for (int32_t column = first; column < end; column += PANEL_COLUMNS)
          for (int32_t s = 0; s < job.summands_.count; ++s) {
            const int32_t count = std::min<int32_t>(end - column, PANEL_COLUMNS);
            const bool opens = column == first && s == 0, closes = column + count == end && s + 1 == job.summands_.count;
            memory.parts.push_back({group, 0, column, count, opens, closes, &job.summands_.weights[s], 0, nullptr});
          }
        ++group;
      }
    }

    static int32_t blocks_of(const Columns& part) {
      return static_cast<int32_t>(ceil_divide((part.count + 3) / 4, PAD) * PAD);
    }
    int64_t panel_bytes(const Columns& part) const { return static_cast<int64_t>(row_groups) * blocks_of(part) * LANES; }

    // Filled up with zero bytes, which add nothing however they are read, to whole matrix tiles.
    void decode(Columns& part, int8_t* panel) {
      const int32_t full = (part.count + 3) / 4, blocks = blocks_of(part);
      kernels_of(*part.weight, k.level).panel(*part.weight, {first_row, rows, part.first, part.count, blocks}, k.flip, panel);
      for (int32_t g = 0; full < blocks && g < row_groups; ++g)
        memset(panel + (static_cast<int64_t>(g) * blocks + full) * LANES, 0, (blocks - full) * LANES);
      part.blocks = blocks;
      part.panel = panel;
    }
  };

  // The sums and outputs of a piece's rows for some of its tokens.
  struct Block {
    const Piece& piece;
    const Activations& a;
    int32_t first, tokens;
    int64_t cells;
    int32_t* sums;   // (row_groups, tokens, 16)
    float* outputs;  // the same

    Block(const Piece& p, int32_t first_token, int32_t count) : piece(p), a(p.job.a_), first(first_token), tokens(count) {
      cells = static_cast<int64_t>(piece.row_groups) * tokens * 16;
      sums = piece.memory.sums.get<int32_t>(cells);
      outputs = piece.memory.outputs.get<float>(cells);
      memset(outputs, 0, sizeof(float) * cells);
    }

    void add(const Columns& part) {
      const int8_t* values = a.values.data() + (piece.job.begin_ + first) * a.stride + part.first;
      const int64_t at = static_cast<int64_t>(piece.job.begin_ + first) * piece.job.groups_ + part.group;
      const float* ws = piece.ws + static_cast<int64_t>(part.group) * TILE_ROWS;
      const Kernels& k = piece.k;
      if (part.groups > 0) {
        k.grouped(part.panel, piece.row_groups, part.blocks, a.group, part.groups, values, a.stride, tokens, ws,
                  a.scale.data() + at, a.sums.data() + at, piece.job.groups_, outputs);
        return;
      }
      if (part.opens) memset(sums, 0, sizeof(int32_t) * cells);
      k.panel(part.panel, piece.row_groups, part.blocks, values, a.stride, tokens, sums);
      if (part.closes)
        k.flush(sums, piece.row_groups, tokens, ws, a.scale.data() + at, a.sums.data() + at, piece.job.groups_,
                k.flip * piece.job.summands_.count, outputs);
    }

    // Token by token, so that what is written lies together.
    void store() const {
      if (piece.minimums != nullptr) {
        const int64_t at = static_cast<int64_t>(piece.job.begin_ + first) * piece.job.groups_;
        piece.k.minimums(piece.minimums, piece.row_groups, tokens, piece.job.groups_, a.scale.data() + at, a.sums.data() + at,
                         outputs);
      }
      const int32_t rows = piece.rows;
      const int64_t step = static_cast<int64_t>(tokens) * 16;
      for (int32_t t = 0; t < tokens; ++t) {
        float* to = piece.job.outputs_ + static_cast<int64_t>(first + t) * piece.job.weight_.rows + piece.first_row;
        const float* from = outputs + static_cast<int64_t>(t) * 16;
        int32_t g = 0;
        for (; g < rows / 16; ++g) memcpy(to + 16 * g, from + g * step, sizeof(float) * 16);
        if (rows % 16 != 0) memcpy(to + 16 * g, from + g * step, sizeof(float) * (rows % 16));
      }
    }
  };

  const Weight& weight_;
  const Summands summands_;
  const Activations& a_;
  int32_t begin_, all_tokens_;
  float* outputs_;
  int64_t row_blocks_;
  int32_t groups_, tokens_;
};

}  // namespace

bool has_panels(const Weight& weight) {
  return !weight.kind->plain && (groups_of(weight) == 1 || activation_group(weight) % 4 == 0);
}

Job* panel_job(const Product& product, int64_t wanted) {
  return new PanelJob(product, wanted);
}

}  // namespace quern
