#include "run/seeds.h"

namespace quern {
namespace {

uint32_t turned(uint32_t x, int by) { return x >> by | x << (32 - by); }

// The first 32 bits of the fractional part of a prime's root.
uint32_t fraction(int prime, bool cubic) {
  // Integer root of prime * 2^(64 or 96), bit by bit: no rounding.
  using Wide = unsigned __int128;
  uint64_t root = 0;
  for (int bit = 35; bit >= 0; --bit) {
    const Wide next = root | uint64_t{1} << bit;
    const Wide power = cubic ? next * next * next : next * next;
    if (power <= static_cast<Wide>(prime) << (cubic ? 96 : 64)) root = static_cast<uint64_t>(next);
  }
  return static_cast<uint32_t>(root);
}

struct Constants {
  uint32_t first[8], rounds[64];

  Constants() {
    int found = 0;
    for (int n = 2; found < 64; ++n) {
      bool prime = true;
      for (int d = 2; d * d <= n; ++d) prime = prime && n % d != 0;
      if (!prime) continue;
      if (found < 8) first[found] = fraction(n, false);
      rounds[found++] = fraction(n, true);
    }
  }
};

void add_block(const Constants& constants, const uint8_t* block, uint32_t* hash) {
  uint32_t w[64];
  for (int i = 0; i < 16; ++i)
    w[i] = static_cast<uint32_t>(block[4 * i]) << 24 | block[4 * i + 1] << 16 | block[4 * i + 2] << 8 | block[4 * i + 3];
  for (int i = 16; i < 64; ++i) {
    const uint32_t a = w[i - 15], b = w[i - 2];
    w[i] = w[i - 16] + (turned(a, 7) ^ turned(a, 18) ^ a >> 3) + w[i - 7] + (turned(b, 17) ^ turned(b, 19) ^ b >> 10);
  }
  uint32_t v[8];
  for (int i = 0; i < 8; ++i) v[i] = hash[i];
  for (int i = 0; i < 64; ++i) {
    const uint32_t e = turned(v[4], 6) ^ turned(v[4], 11) ^ turned(v[4], 25), choice = (v[4] & v[5]) ^ (~v[4] & v[6]);
    const uint32_t one = v[7] + e + choice + constants.rounds[i] + w[i];
    const uint32_t a = turned(v[0], 2) ^ turned(v[0], 13) ^ turned(v[0], 22);
    const uint32_t two = a + ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
    for (int j = 7; j > 0; --j) v[j] = v[j - 1];
    v[4] += one;
    v[0] = one + two;
  }
  for (int i = 0; i < 8; ++i) hash[i] += v[i];
}

// numpy.random.SeedSequence: words of a seed mixed into a pool of four, from which more words are drawn.
class Spread {
 public:
  explicit Spread(uint64_t seed) {
    const uint32_t words[4] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), 0, 0};
    for (int i = 0; i < 4; ++i) pool_[i] = hashed_in(words[i]);
    for (int from = 0; from < 4; ++from)
      for (int to = 0; to < 4; ++to)
        if (from != to) {
          const uint32_t mixed = 0xca01f9ddu * pool_[to] - 0x4973f715u * hashed_in(pool_[from]);
          pool_[to] = mixed ^ mixed >> 16;
        }
  }

  uint64_t next() {
    const uint64_t low = word();
    return low | static_cast<uint64_t>(word()) << 32;
  }

 private:
  uint32_t hashed_in(uint32_t value) {
    value ^= in_;
    in_ *= 0x931e8875u;
    value *= in_;
    return value ^ value >> 16;
  }

  uint32_t word() {
    uint32_t value = pool_[drawn_++ % 4] ^ out_;
    out_ *= 0x58f38dedu;
    value *= out_;
    return value ^ value >> 16;
  }

  uint32_t pool_[4], in_ = 0x43b0d7e5u, out_ = 0x8b51f9ddu;
  int drawn_ = 0;
};

}  // namespace

uint64_t hashed(const std::string& text) {
  static const Constants constants;
  uint32_t hash[8];
  for (int i = 0; i < 8; ++i) hash[i] = constants.first[i];
  std::string padded = text + '\x80';
  while (padded.size() % 64 != 56) padded += '\0';
  for (int shift = 56; shift >= 0; shift -= 8) padded += static_cast<char>(static_cast<uint64_t>(text.size()) * 8 >> shift);
  for (size_t at = 0; at < padded.size(); at += 64) add_block(constants, reinterpret_cast<const uint8_t*>(padded.data()) + at, hash);
  uint64_t first = 0;
  for (int byte = 7; byte >= 0; --byte) first = first << 8 | (hash[byte / 4] >> (24 - 8 * (byte % 4)) & 255);
  return first;
}

Draw::Draw(uint64_t seed) {
  Spread spread(hashed(std::to_string(seed) + "\x1fgenerate") >> 1);
  const auto wide = [&] {
    const Wide high = spread.next();
    return high << 64 | spread.next();
  };
  const Wide state = wide();
  increment_ = wide() << 1 | 1;
  step();
  state_ += state;
  step();
}

void Draw::step() {
  constexpr Wide FACTOR = static_cast<Wide>(0x2360ed051fc65da4ull) << 64 | 0x4385df649fccf645ull;
  state_ = state_ * FACTOR + increment_;
}

double Draw::next() {
  step();
  const uint64_t mixed = static_cast<uint64_t>(state_ >> 64) ^ static_cast<uint64_t>(state_);
  const int by = static_cast<int>(state_ >> 122);
  const uint64_t number = mixed >> by | mixed << (-by & 63);
  return static_cast<double>(number >> 11) * 0x1p-53;
}

}  // namespace quern
