#include "bind/matrix.h"

#include "kernels/checked_weight.h"

namespace quern {
namespace {

template <typename Array>
Span span_of(const std::optional<Array>& array) {
  return array ? Span{array->data(), static_cast<int64_t>(array->nbytes())} : Span{};
}

}  // namespace

Matrix::Matrix(const std::string& kind, int32_t rows, int32_t columns, Bytes codes, std::optional<Bytes> scale,
               const std::string& scale_type, std::optional<int32_t> group, bool one_scale, std::optional<Bytes> zeros,
               std::optional<Array<int8_t, nanobind::ndim<1>>> table, int32_t bits, int32_t window, int32_t tables,
               int32_t lag, float scale_factor)
    : codes_(std::move(codes)), scale_(std::move(scale)), zeros_(std::move(zeros)), table_(std::move(table)) {
  require(!group || *group > 0, "a group has 1 to " + std::to_string(columns) + " columns");
  weight_ = checked_weight({kind, rows, columns, group.value_or(0), scale_ ? float_called(scale_type) : Float::float16, one_scale, bits,
                            window, tables, lag, scale_factor, {codes_.data(), static_cast<int64_t>(codes_.nbytes())},
                            span_of(scale_), span_of(zeros_), span_of(table_)});
  bytes_ = array_bytes(weight_).total();
}

}  // namespace quern
