#include "bind/matrix.h"

namespace quern {
namespace {

Kind kind_of(const std::string& name) {
  if (name == "integer4") return Kind::integer4;
  if (name == "integer8") return Kind::integer8;
  if (name == "codebook4") return Kind::codebook4;
  if (name == "trellis") return Kind::trellis;
  if (name == "bfloat16") return Kind::bfloat16;
  if (name == "float32") return Kind::float32;
  throw std::invalid_argument("unknown kind of matrix '" + name +
                              "'; known: integer4, integer8, codebook4, trellis, bfloat16, float32");
}

Float float_of(const std::string& name) {
  if (name == "float16") return Float::float16;
  if (name == "bfloat16") return Float::bfloat16;
  if (name == "float32") return Float::float32;
  throw std::invalid_argument("unknown dtype of scales '" + name + "'; known: float16, bfloat16, float32");
}

void require_size(const char* what, int64_t found, int64_t expected) {
  require(found == expected, std::string(what) + " has " + std::to_string(found) + " bytes; this matrix needs " +
                                 std::to_string(expected));
}

void require_aligned(const char* what, const void* data, uintptr_t size) {
  require(reinterpret_cast<uintptr_t>(data) % size == 0,
          std::string(what) + " must begin at a multiple of " + std::to_string(size) + " bytes");
}

// Bytes of a row of codes; for integer4 whole 32-bit words, as they are stored.
int64_t row_bytes(Kind kind, int64_t columns) {
  switch (kind) {
    case Kind::integer4:
    case Kind::codebook4: return (columns + 7) / 8 * 4;
    case Kind::integer8: return columns;
    case Kind::bfloat16: return 2 * columns;
    case Kind::float32: return 4 * columns;
    default: return 0;
  }
}

}  // namespace

Matrix::Matrix(const std::string& kind, int32_t rows, int32_t columns, Bytes codes, std::optional<Bytes> scale,
               const std::string& scale_type, std::optional<int32_t> group, bool one_scale, std::optional<Bytes> zeros,
               std::optional<Array<int8_t, nanobind::ndim<1>>> table, int32_t bits, int32_t window, int32_t tables,
               int32_t lag)
    : codes_(std::move(codes)), scale_(std::move(scale)), zeros_(std::move(zeros)), table_(std::move(table)) {
  Weight& w = weight_;
  require(rows > 0 && columns > 0, "a matrix needs at least one row and one column");
  w.kind = kind_of(kind);
  w.rows = rows;
  w.columns = columns;
  w.group = group ? *group : columns;
  require(w.group > 0 && w.group <= columns, "a group has 1 to " + std::to_string(columns) + " columns");
  w.row_bytes = row_bytes(w.kind, columns);
  w.codes = codes_.data();
  w.bits = bits;
  w.window = window;
  w.tables = tables;
  w.lag = lag;
  if (w.kind == Kind::trellis) {
    require(bits >= 1 && bits <= 4, "a trellis has 1 to 4 bits a weight");
    require(window == 6 || window == 7, "a trellis has a window of 6 or 7 bits");
    require(tables == 1 || tables == 2, "a trellis has one or two tables");
    require(tables == 1 ? lag == 0 : lag >= 1 && lag <= 8, "the second table lags by 1 to 8 steps");
    require(w.group == columns, "a trellis has one scale a row");
  }
  require_size("codes", static_cast<int64_t>(codes_.nbytes()), code_bytes(w));
  const bool plain = w.kind == Kind::bfloat16 || w.kind == Kind::float32;
  if (plain) require_aligned("codes", w.codes, w.kind == Kind::float32 ? 4 : 2);
  require(plain != scale_.has_value(), "packed kinds have scales, plain ones have none");
  const int64_t groups = (columns + w.group - 1) / w.group, scale_rows = one_scale ? 1 : rows;
  if (!plain) {
    w.scale_type = float_of(scale_type);
    require_size("scale", scale_->nbytes(), groups * scale_rows * (w.scale_type == Float::float32 ? 4 : 2));
    require_aligned("scale", scale_->data(), w.scale_type == Float::float32 ? 4 : 2);
    w.scale = scale_->data();
    w.scale_stride = one_scale ? 0 : groups;
  }
  if (zeros_) {
    require(w.kind == Kind::integer4, "only integer4 has zero points");
    require_size("zeros", zeros_->nbytes(), (scale_rows + 7) / 8 * groups * 4);
    require_aligned("zeros", zeros_->data(), alignof(int32_t));
    w.zeros = reinterpret_cast<const int32_t*>(zeros_->data());
  }
  const bool tabled = w.kind == Kind::trellis || w.kind == Kind::codebook4;
  require(tabled == table_.has_value(), "trellis and codebook4 have tables, the others none");
  if (tabled) {
    require_size("table", table_->nbytes(), w.kind == Kind::trellis ? static_cast<int64_t>(tables) << window : 16);
    w.table = table_->data();
  }
  bytes_ = static_cast<int64_t>(codes_.nbytes()) + (scale_ ? scale_->nbytes() : 0) + (zeros_ ? zeros_->nbytes() : 0) +
           (table_ ? table_->nbytes() : 0);
}

}  // namespace quern
