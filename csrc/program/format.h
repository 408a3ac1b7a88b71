// A run file: a decoder's steps, the arrays that they read and a tokenizer in one file, which is mapped and read where it lies.
//
// All numbers are little-endian. The file begins with `Header`; arrays begin at multiples of ALIGNMENT bytes. The program is
// numbers and texts one after the other, as write_program and read_program of this folder have them; an array is in it as where
// it begins and its bytes, both 64 bits wide, a text as its bytes' number and the bytes. Another VERSION is another layout.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

namespace quern {

constexpr char MAGIC[8] = {'Q', 'U', 'E', 'R', 'N', 'R', 'U', 'N'};
constexpr uint32_t VERSION = 1;
constexpr int64_t ALIGNMENT = 64;

struct Header {
  char magic[8];
  uint32_t version, reserved;
  uint64_t file_bytes;
  uint64_t program_at, program_bytes;
  uint64_t tokenizer_at, tokenizer_bytes;
  uint64_t unused;
};
static_assert(sizeof(Header) == ALIGNMENT, "the first array follows the header");
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "numbers are read as they lie");

enum class StepCode : uint32_t { embed = 1, norm = 2, project = 3, rotate = 4, store = 5, attend = 6, activate = 7, add = 8, routed = 9 };

// What a model is beside its decoder.
struct ModelFacts {
  int32_t context = 0;        // tokens
  int32_t switch_length = 0;  // tokens beyond which a text goes by the second set of rotary frequencies; 0: none
};

// A file that is not what it should be.
struct BadFile : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Numbers of a part of the file, front to back. Throws BadFile past its end.
class Cursor {
 public:
  Cursor(const uint8_t* data, uint64_t bytes, const char* what) : at_(data), left_(bytes), what_(what) {}

  const uint8_t* take(uint64_t bytes) {
    if (bytes > left_) throw BadFile(std::string(what_) + " ends early");
    const uint8_t* found = at_;
    at_ += bytes;
    left_ -= bytes;
    return found;
  }
  template <typename T>
  T number() {
    T value;
    memcpy(&value, take(sizeof value), sizeof value);
    return value;
  }
  // A count of things of at least `bytes` bytes each, which must still be there: nothing is allocated for what is not.
  uint32_t count(uint64_t bytes) {
    const uint32_t found = number<uint32_t>();
    if (found > left_ / bytes) throw BadFile(std::string(what_) + " ends early");
    return found;
  }
  std::string text() {
    const uint32_t bytes = count(1);
    return std::string(reinterpret_cast<const char*>(take(bytes)), bytes);
  }
  bool done() const { return left_ == 0; }

 private:
  const uint8_t* at_;
  uint64_t left_;
  const char* what_;
};

}  // namespace quern
