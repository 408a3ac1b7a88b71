// The trellis encoder as Python sees it.
#include <algorithm>
#include <cmath>
#include <vector>

#include "bind/arrays.h"
#include "kernels/dispatch.h"
#include "trellis/encode.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace quern {
namespace {

using Table = Array<int8_t, nb::ndim<2>>;
using Matrix2 = Array<float, nb::ndim<2>>;
using FloatsOut = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using MatrixOut = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

TrellisCode checked_code(int32_t bits, int32_t lag, const Table& table) {
  int32_t window = 0;
  while (window < 8 && size_t{1} << window < table.shape(1)) ++window;
  require(size_t{1} << window == table.shape(1), "a table of a trellis has 2^window entries");
  return TrellisCode(bits, window, static_cast<int32_t>(table.shape(0)), lag, table.data());
}

class BoundEncoder {
 public:
  BoundEncoder(int32_t bits, int32_t lag, const Table& table, const Floats& scales, int32_t columns,
               const std::string& isa)
      : encoder_(checked_code(bits, lag, table), checked_scales(scales), columns, checked_isa(isa)) {
    require(columns > 0, "a matrix has at least one column");
  }

  void round(int32_t column, const Floats& values, FloatsOut& decoded) {
    require(column >= 0 && column < encoder_.columns(), "there is no such column");
    require(is_column(values.shape(0)) && is_column(decoded.shape(0)), "a column has one number a row");
    const float* in = values.data();
    float* out = decoded.data();
    nb::gil_scoped_release release;
    encoder_.round(column, in, out);
  }

  void round_all(const Matrix2& weight, MatrixOut& decoded) {
    const size_t columns = static_cast<size_t>(encoder_.columns());
    require(is_column(weight.shape(0)) && weight.shape(1) == columns && is_column(decoded.shape(0)) &&
                decoded.shape(1) == columns,
            "the matrices must have the encoder's shape");
    const float* in = weight.data();
    float* out = decoded.data();
    nb::gil_scoped_release release;
    encoder_.round_all(in, out);
  }

  nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>> codes() const {
    const std::vector<uint8_t>& codes = encoder_.codes();
    uint8_t* copy = new uint8_t[codes.size()];
    std::copy(codes.begin(), codes.end(), copy);
    nb::capsule owner(copy, [](void* p) noexcept { delete[] static_cast<uint8_t*>(p); });
    return {copy, {codes.size()}, owner};
  }

 private:
  static std::string checked_isa(const std::string& isa) {
    if (isa.empty()) return active_isa();
    const std::vector<std::string> known = available_isas();
    require(std::find(known.begin(), known.end(), isa) != known.end(), "this machine has no instruction set " + isa);
    return isa;
  }

  static std::vector<float> checked_scales(const Floats& scales) {
    require(scales.shape(0) > 0 && scales.shape(0) < size_t{1} << 31, "a matrix has at least one row");
    for (size_t i = 0; i < scales.shape(0); ++i)
      require(std::isfinite(scales.data()[i]) && scales.data()[i] >= 0, "scales are finite and not below zero");
    return std::vector<float>(scales.data(), scales.data() + scales.shape(0));
  }

  bool is_column(size_t numbers) const { return numbers == static_cast<size_t>(encoder_.rows()); }

  TrellisEncoder encoder_;
};

}  // namespace
}  // namespace quern

void bind_trellis(nb::module_& module) {
  using quern::BoundEncoder;
  nb::class_<BoundEncoder>(module, "TrellisEncoder", "Rounds columns to the points of a trellis code; csrc/trellis/encode.h")
      .def(nb::init<int32_t, int32_t, const quern::Table&, const quern::Floats&, int32_t, const std::string&>(), "bits"_a,
           "lag"_a, "table"_a.noconvert(), "scales"_a.noconvert(), "columns"_a, "isa"_a = "")
      .def("round", &BoundEncoder::round, "column"_a, "values"_a.noconvert(), "decoded"_a.noconvert(),
           "Round one column; writes what its codes stand for into `decoded`.")
      .def("round_all", &BoundEncoder::round_all, "weight"_a.noconvert(), "decoded"_a.noconvert(),
           "Round a matrix (rows, columns).")
      .def("codes", &BoundEncoder::codes, "A copy of the codes, flat, in the stored layout.");
}
