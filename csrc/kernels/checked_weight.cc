#include "kernels/checked_weight.h"

#include <stdexcept>

#include "kernels/kind.h"

namespace quern {
namespace {

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

void require_size(const char* what, int64_t found, int64_t expected) {
  require(found == expected, std::string(what) + " has " + std::to_string(found) + " bytes; this matrix needs " +
                                 std::to_string(expected));
}

void require_aligned(const char* what, const void* data, uintptr_t size) {
  require(reinterpret_cast<uintptr_t>(data) % size == 0,
          std::string(what) + " must begin at a multiple of " + std::to_string(size) + " bytes");
}

int64_t groups_of(const Weight& w) { return (static_cast<int64_t>(w.columns) + w.group - 1) / w.group; }

int64_t zero_bytes(int64_t scale_rows, int64_t groups) { return (scale_rows + 7) / 8 * groups * 4; }

void set_table(const WeightArrays& given, Weight& w) {
  const WeightKind& k = *w.kind;
  const bool tabled = k.table_bytes != nullptr;
  require(tabled == (given.table.data != nullptr), given.kind + (tabled ? " needs a table" : " has no table"));
  if (!tabled) return;
  w.table = static_cast<const int8_t*>(given.table.data);
  const int64_t one = k.table_bytes(w), groups = groups_of(w);
  const bool rows_own = !k.tiled() && k.scaled;  // may have tables of their own
  if (rows_own && given.table.size == one * w.rows) {
    w.table_row = one;
  } else if (rows_own && given.table.size == one * w.rows * groups) {  // a table for each scale
    w.table_row = groups * one;
    w.table_group = one;
  } else {
    require_size("table", given.table.size, one);
  }
}

}  // namespace

Weight checked_weight(const WeightArrays& given) {
  Weight w{};
  require(given.rows > 0 && given.columns > 0, "a matrix needs at least one row and one column");
  const WeightKind& k = kind_called(given.kind);
  w.kind = &k;
  w.rows = given.rows;
  w.columns = given.columns;
  w.group = given.group != 0 ? given.group : given.columns;
  require(w.group > 0 && w.group <= w.columns, "a group has 1 to " + std::to_string(w.columns) + " columns");
  w.row_bytes = k.tiled() ? 0 : k.row_bytes(w.columns);
  w.codes = given.codes.data;
  w.bits = given.bits;
  w.window = given.window;
  w.tables = given.tables;
  w.lag = given.lag;
  w.scale_factor = given.scale_factor;
  if (k.check != nullptr) k.check(w);
  require_size("codes", given.codes.size, code_bytes(w));
  require_aligned("codes", w.codes, static_cast<uintptr_t>(k.alignment));
  require(k.scaled == (given.scale.data != nullptr), given.kind + (k.scaled ? " needs scales" : " has no scales"));
  const int64_t groups = groups_of(w), scale_rows = given.one_scale ? 1 : w.rows;
  if (k.scaled) {
    w.scale_type = given.scale_type;
    require_size("scale", given.scale.size, groups * scale_rows * bytes_of(w.scale_type));
    require_aligned("scale", given.scale.data, static_cast<uintptr_t>(bytes_of(w.scale_type)));
    w.scale = given.scale.data;
    w.scale_stride = given.one_scale ? 0 : groups;
  }
  if (given.zeros.data != nullptr) {
    require(k.zero_points, given.kind + " has no zero points");
    require_size("zeros", given.zeros.size, zero_bytes(scale_rows, groups));
    require_aligned("zeros", given.zeros.data, alignof(int32_t));
    w.zeros = static_cast<const int32_t*>(given.zeros.data);
  }
  set_table(given, w);
  return w;
}

ArrayBytes array_bytes(const Weight& w) {
  const int64_t groups = groups_of(w), scale_rows = w.kind->scaled && w.scale_stride == 0 ? 1 : w.rows;
  ArrayBytes bytes{code_bytes(w), 0, 0, 0};
  if (w.scale != nullptr) bytes.scale = groups * scale_rows * bytes_of(w.scale_type);
  if (w.zeros != nullptr) bytes.zeros = zero_bytes(scale_rows, groups);
  if (w.table != nullptr) {
    const int64_t one = w.kind->table_bytes(w);
    bytes.table = w.table_row == 0 ? one : w.table_row * w.rows;
  }
  return bytes;
}

Float float_called(const std::string& name) {
  if (name == "float16") return Float::float16;
  if (name == "bfloat16") return Float::bfloat16;
  if (name == "float32") return Float::float32;
  if (name == "float8_e4m3fn") return Float::float8_e4m3;
  if (name == "float8_e8m0fnu") return Float::float8_e8m0;
  throw std::invalid_argument("unknown dtype of scales '" + name +
                              "'; known: float16, bfloat16, float32, float8_e4m3fn, float8_e8m0fnu");
}

}  // namespace quern
