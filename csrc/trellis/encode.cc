#include "trellis/encode.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace quern {

namespace {

constexpr int32_t FIXED_POINT = 5;         // bits of an input behind the point
constexpr float INPUT_LIMIT = 511.0f;      // 2 x 511 x 2^5 is the largest that int16 holds
constexpr int32_t UNREACHABLE = 1 << 29;   // more than any path costs: 24 steps stay below 2^28
constexpr int32_t SEARCHED_CIRCLE = 16;    // streams of so few bits are tried out, all of them
constexpr int32_t SEAM_STEPS = 16;         // steps on either side of the seam that rate the states to cross it in
constexpr int32_t FEW_STATES = 32;
constexpr int32_t SEAMS = 4;               // the best rated states are followed once around, so many of them
constexpr int32_t MORE_SEAMS = 8;          // of more than FEW_STATES
constexpr int32_t STRIPE = 16;             // columns of a row that are one line of the cache

// The nearest integer, ties to even, of |x| < 2^22, and without a call into the library.
int32_t nearest(float x) {
  const float shifted = x + 12582912.0f;  // 1.5 x 2^23: no bits are left behind the point
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  return bits - 0x4B400000;
}

float limited(float x) {
  if (!(x > -INPUT_LIMIT)) return -INPUT_LIMIT;  // NaN too
  return x < INPUT_LIMIT ? x : INPUT_LIMIT;
}

}  // namespace

TrellisEncoder::TrellisEncoder(TrellisCode code, std::vector<float> scales, int32_t columns, const std::string& isa)
    : code_(std::move(code)), kernels_(trellis_kernels(isa)), scales_(std::move(scales)), columns_(columns) {
  for (const float scale : scales_) inverses_.push_back(scale > 0 ? 1 / scale : 0.0f);
  codes_.resize(static_cast<size_t>(code_.code_bytes(rows(), columns)));
  const size_t states = size_t{TRELLIS_LANES} << (code_.span() - code_.bits());
  costs_.resize(states);
  other_costs_.resize(states);
  seam_costs_.resize(states);
  history_.resize(states * TILE_LANE_ROWS);
}

void TrellisEncoder::round(int32_t column, const float* values, float* decoded) {
  for (int32_t row = 0; row < rows(); row += TILE_ROWS) round_tile(row, column, values + row, decoded + row);
}

void TrellisEncoder::round_all(const float* weight, float* decoded) {
  float in[STRIPE][TILE_ROWS], out[STRIPE][TILE_ROWS];
  for (int32_t row = 0; row < rows(); row += TILE_ROWS) {
    const int32_t height = std::min(TILE_ROWS, rows() - row);
    for (int32_t column = 0; column < columns_; column += STRIPE) {
      const int32_t width = std::min(STRIPE, columns_ - column);
      const int64_t corner = static_cast<int64_t>(row) * columns_ + column;
      for (int32_t r = 0; r < height; ++r)
        for (int32_t c = 0; c < width; ++c) in[c][r] = weight[corner + static_cast<int64_t>(r) * columns_ + c];
      for (int32_t c = 0; c < width; ++c) round_tile(row, column + c, in[c], out[c]);
      for (int32_t r = 0; r < height; ++r)
        for (int32_t c = 0; c < width; ++c) decoded[corner + static_cast<int64_t>(r) * columns_ + c] = out[c][r];
    }
  }
}

void TrellisEncoder::round_tile(int32_t first_row, int32_t column, const float* values, float* decoded) {
  const int32_t height = std::min(TILE_ROWS, rows() - first_row), steps = TrellisCode::steps(height);
  const int32_t bytes = code_.stream_bytes(height), bits = code_.bits();
  const float unit = static_cast<float>(2 << FIXED_POINT >> bits);
  const float* inverse = inverses_.data() + first_row;
  for (int32_t i = 0; i < steps * TRELLIS_LANES; ++i) {
    // Rows below the matrix weigh nothing.
    const int32_t twice = i < height ? nearest(limited(values[i] * inverse[i]) * unit) : 0;
    inputs_[i] = static_cast<int32_t>(static_cast<uint32_t>(twice * (1 << bits)) & 0xFFFF) | (i < height ? 1 << (FIXED_POINT + 16) : 0);
  }
  find_streams(steps, 8 * bytes);
  for (int32_t i = 0; i < height; ++i) decoded[i] = static_cast<float>(code_.value(path_[i])) * scales_[first_row + i];
  const int64_t blocks = (columns_ + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS;
  const int64_t tile = first_row / TILE_ROWS * blocks * code_.stream_bytes(TILE_ROWS);
  uint8_t* out = codes_.data() + (tile + column / BLOCK_COLUMNS * int64_t{bytes}) * REGISTER_BYTES + column % BLOCK_COLUMNS;
  for (int32_t lane = 0; lane < TRELLIS_LANES; ++lane)
    for (int32_t j = 0; j < bytes; ++j)
      out[j * REGISTER_BYTES + lane * BLOCK_COLUMNS] = static_cast<uint8_t>(streams_[lane] >> (8 * j) & 0xFF);
}

int32_t* TrellisEncoder::start(int32_t cost) {
  std::fill(costs_.begin(), costs_.end(), cost);
  return costs_.data();
}

namespace {

// From the states after the last of `steps` back to those before the first, in the lanes where `wanted`.
void trace(const TrellisBranches& code, const uint8_t* history, int32_t steps, const bool* wanted, int32_t* states,
           uint16_t* path) {
  const int32_t kept = (1 << (code.span - code.bits)) - 1, mask = (1 << code.bits) - 1;
  const int64_t stride = int64_t{TRELLIS_LANES} << (code.span - code.bits);
  for (int32_t t = steps - 1; t >= 0; --t)
    for (int32_t lane = 0; lane < TRELLIS_LANES; ++lane) {
      if (!wanted[lane]) continue;
      const int32_t taken = history[t * stride + states[lane] * TRELLIS_LANES + lane] & mask;
      const int32_t branch = states[lane] << code.bits | taken;
      path[t * TRELLIS_LANES + lane] = static_cast<uint16_t>(branch);
      states[lane] = branch & kept;
    }
}

// A step that adds `bits` bits to the stream and has no value.
void pass_bits(const int32_t* from, int32_t* to, int32_t states, int32_t bits) {
  for (int32_t state = 0; state < states; ++state)
    for (int32_t lane = 0; lane < TRELLIS_LANES; ++lane) {
      int32_t lowest = INT32_MAX;
      for (int32_t j = 0; j < 1 << bits; ++j)
        lowest = std::min(lowest, from[((state << bits | j) & (states - 1)) * TRELLIS_LANES + lane]);
      to[state * TRELLIS_LANES + lane] = lowest;
    }
}

}  // namespace

// The best stream of each lane, read around the end of `circle` bits: exactly where the circle is short. Elsewhere the
// states in which a path may cross the seam (the end of the last step, where the stream begins anew) are rated by the steps
// around it, and paths from the best rated ones once around to themselves are compared.
void TrellisEncoder::find_streams(int32_t steps, int32_t circle) {
  if (circle <= SEARCHED_CIRCLE) return search_all(steps, circle);
  const int32_t state_bits = code_.span() - code_.bits(), spare_bits = circle - code_.bits() * steps;
  // Before the first step lie the bits that no step owns, and only before them the last steps' bits.
  const int32_t tied_bits = std::max(0, state_bits - spare_bits);
  rate_seams(steps, spare_bits, tied_bits);
  int32_t lowest[TRELLIS_LANES];
  std::fill(lowest, lowest + TRELLIS_LANES, INT32_MAX);
  const int32_t followed = std::min(1 << state_bits > FEW_STATES ? MORE_SEAMS : SEAMS, 1 << tied_bits);
  for (int32_t i = 0; i < followed; ++i) {
    int32_t seams[TRELLIS_LANES], unused[TRELLIS_LANES];
    kernels_.find_least(seam_costs_.data(), 1 << tied_bits, code_.bits(), seams, unused);
    for (int32_t lane = 0; lane < TRELLIS_LANES; ++lane) seam_costs_[seams[lane] * TRELLIS_LANES + lane] = INT32_MAX;
    follow(steps, tied_bits, seams, lowest);
  }
  for (int32_t lane = 0; lane < TRELLIS_LANES; ++lane) {
    uint64_t stream = 0;
    if (tied_bits < state_bits)
      stream = static_cast<uint64_t>(before_[lane] >> tied_bits) << (circle - (state_bits - tied_bits));
    for (int32_t t = 0; t < steps; ++t)
      stream |= static_cast<uint64_t>(path_[t * TRELLIS_LANES + lane] >> state_bits) << (code_.bits() * t);
    streams_[lane] = stream;
  }
}

void TrellisEncoder::search_all(int32_t steps, int32_t circle) {
  uint32_t best[TRELLIS_LANES];
  kernels_.search(code_.branches(), inputs_, steps, circle, best);
  for (int32_t lane = 0; lane < TRELLIS_LANES; ++lane) {
    streams_[lane] = best[lane];
    for (int32_t t = 0; t < steps; ++t) {
      uint32_t branch = 0;
      for (int32_t bit = 0; bit < code_.span(); ++bit) {
        const int32_t position = (code_.bits() * (t + 1) - code_.span() + bit + 2 * circle) % circle;
        branch |= (best[lane] >> position & 1) << bit;
      }
      path_[t * TRELLIS_LANES + lane] = static_cast<uint16_t>(branch);
    }
  }
}

// What the steps before and after the seam cost if it is crossed with given tied bits; their far ends are free.
void TrellisEncoder::rate_seams(int32_t steps, int32_t spare_bits, int32_t tied_bits) {
  const TrellisBranches code = code_.branches();
  const int32_t states = 1 << (code.span - code.bits), around = std::min(steps, SEAM_STEPS);
  int32_t* costs = start(0);
  costs = kernels_.backward(code, inputs_, around, costs, other_costs_.data());
  std::copy(costs, costs + states * TRELLIS_LANES, seam_costs_.data());
  costs = kernels_.forward(code, inputs_ + (steps - around) * TRELLIS_LANES, around, start(0), other_costs_.data(), nullptr);
  if (spare_bits > 0) {
    int32_t* other = costs == costs_.data() ? other_costs_.data() : costs_.data();
    pass_bits(costs, other, states, spare_bits);
    costs = other;
  }
  for (int32_t i = 0; i < states * TRELLIS_LANES; ++i) seam_costs_[i] += costs[i];
  for (int32_t seam = 0; seam < 1 << tied_bits; ++seam)
    for (int32_t state = seam + (1 << tied_bits); state < states; state += 1 << tied_bits)
      for (int32_t lane = 0; lane < TRELLIS_LANES; ++lane)
        seam_costs_[seam * TRELLIS_LANES + lane] =
            std::min(seam_costs_[seam * TRELLIS_LANES + lane], seam_costs_[state * TRELLIS_LANES + lane]);
}

// The best paths once around from `seams`; kept in the lanes where they cost less than `lowest`.
void TrellisEncoder::follow(int32_t steps, int32_t tied_bits, const int32_t* seams, int32_t* lowest) {
  const TrellisBranches code = code_.branches();
  const int32_t free_states = 1 << (code.span - code.bits - tied_bits);
  int32_t* costs = start(UNREACHABLE);
  for (int32_t lane = 0; lane < TRELLIS_LANES; ++lane)
    for (int32_t i = 0; i < free_states; ++i) costs[(i << tied_bits | seams[lane]) * TRELLIS_LANES + lane] = 0;
  costs = kernels_.forward(code, inputs_, steps, costs, other_costs_.data(), history_.data());
  bool better[TRELLIS_LANES];
  int32_t states[TRELLIS_LANES];
  for (int32_t lane = 0; lane < TRELLIS_LANES; ++lane) {
    better[lane] = false;
    for (int32_t state = seams[lane] * free_states; state < (seams[lane] + 1) * free_states; ++state) {
      const int32_t cost = costs[state * TRELLIS_LANES + lane] >> code.bits;  // without the branch
      if (cost >= lowest[lane]) continue;
      lowest[lane] = cost;
      states[lane] = state;
      better[lane] = true;
    }
  }
  trace(code, history_.data(), steps, better, states, path_);
  for (int32_t lane = 0; lane < TRELLIS_LANES; ++lane)
    if (better[lane]) before_[lane] = states[lane];
}

}  // namespace quern
