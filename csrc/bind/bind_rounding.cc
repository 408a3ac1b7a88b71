// The loops over columns of csrc/rounding as Python sees them.
#include <algorithm>
#include <vector>

#include "bind/arrays.h"
#include "kernels/dispatch.h"
#include "rounding/columns.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace quern {
namespace {

using Matrix2 = Array<float, nb::ndim<2>>;
using MatrixOut = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using CodesOut = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Places = Array<int32_t, nb::ndim<1>>;

// The arrays are those of an encoder, which may change them between two calls.
class BoundColumns {
 public:
  BoundColumns(const CodesOut& codes, const Matrix2& scale, const Matrix2& zero, int64_t group, int32_t count,
               const Floats& limits, const Floats& numbers, const Bytes& ranked, const std::string& isa)
      : codes_(codes), scale_(scale), zero_(zero), group_(group), limits_(limits.data(), limits.data() + limits.shape(0)),
        numbers_(numbers.data(), numbers.data() + numbers.shape(0)),
        ranked_(ranked.data(), ranked.data() + ranked.shape(0)), kernels_(column_kernels(checked_isa(isa))), count_(count) {
    const size_t columns = codes.shape(0), rows = codes.shape(1);
    require(group >= 1 && columns >= 1 && rows >= 1, "a matrix has rows, columns and groups");
    require(count >= 2 && count <= 256, "a code is a byte and stands for one of at least two numbers");
    const size_t groups = (columns + group - 1) / group;
    for (const Matrix2& one : {scale, zero})
      require(one.shape(0) == groups && one.shape(1) == rows, "scales and zero points are (groups, rows)");
    const size_t ranks = numbers_.size();
    require(ranked_.size() == ranks && (ranks ? ranks == size_t(count) && limits_.size() + 1 == ranks : limits_.empty()),
            "numbers that are listed have a code each, and a limit between two of them");
  }

  void feed_forward(const Places& places, int64_t first, int64_t last, const Matrix2& inside, const Matrix2& original,
                    MatrixOut& target, MatrixOut& done, MatrixOut& rounded) const {
    const ColumnBlock block = checked(places, first, last, inside);
    check(block, original.shape(0), original.shape(1));
    for (const MatrixOut* one : {&target, &done, &rounded}) check(block, one->shape(0), one->shape(1));
    const float *weights = inside.data(), *from = original.data();
    float *wanted = target.data(), *left = done.data(), *to = rounded.data();
    nb::gil_scoped_release release;
    kernels_.feed_forward(grid(), rows(), block, weights, from, wanted, left, to);
  }

  void sweep(const Places& places, int64_t first, int64_t last, const Matrix2& hessian, MatrixOut& rounded,
             MatrixOut& residual) const {
    const ColumnBlock block = checked(places, first, last, hessian);
    for (const MatrixOut* one : {&rounded, &residual}) check(block, one->shape(0), one->shape(1));
    const float* weights = hessian.data();
    float *now = rounded.data(), *left = residual.data();
    nb::gil_scoped_release release;
    kernels_.sweep(grid(), rows(), block, weights, now, left);
  }

 private:
  static std::string checked_isa(const std::string& isa) {
    if (isa.empty()) return active_isa();
    const std::vector<std::string> known = available_isas();
    require(std::find(known.begin(), known.end(), isa) != known.end(), "this machine has no instruction set " + isa);
    return isa;
  }

  ColumnBlock checked(const Places& places, int64_t first, int64_t last, const Matrix2& square) const {
    const int64_t size = static_cast<int64_t>(places.shape(0)), columns = static_cast<int64_t>(codes_.shape(0));
    require(first >= 0 && first <= last && last <= size, "there are no such columns in the block");
    for (int64_t k = 0; k < size; ++k)
      require(places.data()[k] >= 0 && places.data()[k] < columns, "there is no such column");
    require(square.shape(0) == places.shape(0) && square.shape(1) == places.shape(0), "a block's matrix is square");
    return {size, first, last, places.data()};
  }

  void check(const ColumnBlock& block, size_t columns, size_t height) const {
    require(columns == static_cast<size_t>(block.size) && height == codes_.shape(1),
            "a block's numbers are (its columns, rows)");
  }

  ColumnGrid grid() const {
    return {count_, numbers_.empty() ? nullptr : limits_.data(), numbers_.data(), ranked_.data()};
  }

  ColumnRows rows() const {
    return {static_cast<int64_t>(codes_.shape(1)), group_, scale_.data(), zero_.data(), codes_.data()};
  }

  CodesOut codes_;
  Matrix2 scale_, zero_;
  int64_t group_;
  std::vector<float> limits_, numbers_;
  std::vector<uint8_t> ranked_;
  const ColumnKernels& kernels_;
  int32_t count_;
};

}  // namespace
}  // namespace quern

void bind_rounding(nb::module_& module) {
  using quern::BoundColumns;
  nb::class_<BoundColumns>(module, "Columns", "Rounds the columns of a block one after the other; csrc/rounding/columns.h")
      .def(nb::init<const quern::CodesOut&, const quern::Matrix2&, const quern::Matrix2&, int64_t, int32_t,
                    const quern::Floats&, const quern::Floats&, const quern::Bytes&, const std::string&>(),
           "codes"_a.noconvert(), "scale"_a.noconvert(), "zero"_a.noconvert(), "group"_a, "count"_a,
           "limits"_a.noconvert(), "numbers"_a.noconvert(), "ranked"_a.noconvert(), "isa"_a = "")
      .def("feed_forward", &BoundColumns::feed_forward, "places"_a.noconvert(), "first"_a, "last"_a,
           "inside"_a.noconvert(), "original"_a.noconvert(), "target"_a.noconvert(), "done"_a.noconvert(),
           "rounded"_a.noconvert(), "Round columns, each with what those of the block before it got wrong.")
      .def("sweep", &BoundColumns::sweep, "places"_a.noconvert(), "first"_a, "last"_a, "hessian"_a.noconvert(),
           "rounded"_a.noconvert(), "residual"_a.noconvert(), "Round columns anew, each with all others as they are.");
}
