// Random numbers as `quern generate` draws them: a seed's name is hashed (SHA-256, FIPS 180-4), the hash spread as numpy's
// SeedSequence does it, and read by PCG64 (O'Neill 2014), so that both programs choose the same tokens.
#pragma once

#include <cstdint>
#include <string>

namespace quern {

// The first eight bytes of a text's SHA-256 as a little-endian number.
uint64_t hashed(const std::string& text);

class Draw {
 public:
  explicit Draw(uint64_t seed);
  double next();  // in [0, 1)

 private:
  using Wide = unsigned __int128;
  void step();

  Wide state_ = 0, increment_ = 0;
};

}  // namespace quern
