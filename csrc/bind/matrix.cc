#include "bind/matrix.h"

#include "kernels/kind.h"

namespace quern {
namespace {

Float float_of(const std::string& name) {
  if (name == "float16") return Float::float16;
  if (name == "bfloat16") return Float::bfloat16;
  if (name == "float32") return Float::float32;
  if (name == "float8_e4m3fn") return Float::float8_e4m3;
  if (name == "float8_e8m0fnu") return Float::float8_e8m0;
  throw std::invalid_argument("unknown dtype of scales '" + name +
                              "'; known: float16, bfloat16, float32, float8_e4m3fn, float8_e8m0fnu");
}

void require_size(const char* what, int64_t found, int64_t expected) {
  require(found == expected, std::string(what) + " has " + std::to_string(found) + " bytes; this matrix needs " +
                                 std::to_string(expected));
}

void require_aligned(const char* what, const void* data, uintptr_t size) {
  require(reinterpret_cast<uintptr_t>(data) % size == 0,
          std::string(what) + " must begin at a multiple of " + std::to_string(size) + " bytes");
}

}  // namespace

Matrix::Matrix(const std::string& kind, int32_t rows, int32_t columns, Bytes codes, std::optional<Bytes> scale,
               const std::string& scale_type, std::optional<int32_t> group, bool one_scale, std::optional<Bytes> zeros,
               std::optional<Array<int8_t, nanobind::ndim<1>>> table, int32_t bits, int32_t window, int32_t tables,
               int32_t lag, float scale_factor)
    : codes_(std::move(codes)), scale_(std::move(scale)), zeros_(std::move(zeros)), table_(std::move(table)) {
  Weight& w = weight_;
  require(rows > 0 && columns > 0, "a matrix needs at least one row and one column");
  const WeightKind& k = kind_called(kind);
  w.kind = &k;
  w.rows = rows;
  w.columns = columns;
  w.group = group ? *group : columns;
  require(w.group > 0 && w.group <= columns, "a group has 1 to " + std::to_string(columns) + " columns");
  w.row_bytes = k.tiled() ? 0 : k.row_bytes(columns);
  w.codes = codes_.data();
  w.bits = bits;
  w.window = window;
  w.tables = tables;
  w.lag = lag;
  w.scale_factor = scale_factor;
  if (k.check != nullptr) k.check(w);
  require_size("codes", static_cast<int64_t>(codes_.nbytes()), code_bytes(w));
  require_aligned("codes", w.codes, static_cast<uintptr_t>(k.alignment));
  require(k.scaled == scale_.has_value(), kind + (k.scaled ? " needs scales" : " has no scales"));
  const int64_t groups = (columns + w.group - 1) / w.group, scale_rows = one_scale ? 1 : rows;
  if (k.scaled) {
    w.scale_type = float_of(scale_type);
    require_size("scale", scale_->nbytes(), groups * scale_rows * bytes_of(w.scale_type));
    require_aligned("scale", scale_->data(), static_cast<uintptr_t>(bytes_of(w.scale_type)));
    w.scale = scale_->data();
    w.scale_stride = one_scale ? 0 : groups;
  }
  if (zeros_) {
    require(k.zero_points, kind + " has no zero points");
    require_size("zeros", zeros_->nbytes(), (scale_rows + 7) / 8 * groups * 4);
    require_aligned("zeros", zeros_->data(), alignof(int32_t));
    w.zeros = reinterpret_cast<const int32_t*>(zeros_->data());
  }
  const bool tabled = k.table_bytes != nullptr;
  require(tabled == table_.has_value(), kind + (tabled ? " needs a table" : " has no table"));
  if (tabled) {
    w.table = table_->data();
    const int64_t one = k.table_bytes(w), found = static_cast<int64_t>(table_->nbytes());
    const bool rows_own = !k.tiled() && k.scaled;  // may have tables of their own
    if (rows_own && found == one * rows) {
      w.table_row = one;
    } else if (rows_own && found == one * rows * groups) {  // a table for each scale
      w.table_row = groups * one;
      w.table_group = one;
    } else {
      require_size("table", found, one);
    }
  }
  bytes_ = static_cast<int64_t>(codes_.nbytes()) + (scale_ ? scale_->nbytes() : 0) + (zeros_ ? zeros_->nbytes() : 0) +
           (table_ ? table_->nbytes() : 0);
}

}  // namespace quern
