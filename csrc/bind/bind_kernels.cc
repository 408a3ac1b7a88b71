// Kernels as Python sees them: for tests and benchmarks. The decoder calls them without Python.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <mutex>
#include <tuple>
#include <vector>

#include "bind/matrix.h"
#include "kernels/dispatch.h"
#include "kernels/kernels.h"
#include "kernels/matmul.h"
#include "kernels/threads.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace quern {
namespace {

using Inputs2 = Array<float, nb::ndim<2>>;
using Matrices = std::vector<std::shared_ptr<Matrix>>;

constexpr int MOST_THREADS = 1024;

// One pool, made anew where another number of threads is asked for. Its lock is held while it works.
class Pool {
 public:
  explicit Pool(int threads) : lock_(mutex()) {
    require(threads >= 0 && threads <= MOST_THREADS, "threads must be 0 (all) to " + std::to_string(MOST_THREADS));
    static std::unique_ptr<ThreadPool>& pool = *new std::unique_ptr<ThreadPool>;  // alive until the process ends
    static int made_for = -1;
    if (made_for != threads) pool.reset(new ThreadPool(threads));
    made_for = threads;
    pool_ = pool.get();
  }
  ThreadPool& operator*() { return *pool_; }

 private:
  static std::mutex& mutex() {
    static std::mutex& one = *new std::mutex;
    return one;
  }
  std::lock_guard<std::mutex> lock_;
  ThreadPool* pool_;
};

struct Shape {
  int32_t tokens, columns;
};

Shape shape_of(const Inputs2& inputs) {
  require(inputs.shape(0) <= INT32_MAX && inputs.shape(1) <= INT32_MAX, "inputs are too large");
  return {static_cast<int32_t>(inputs.shape(0)), static_cast<int32_t>(inputs.shape(1))};
}

auto multiply_array(const Matrix& matrix, const Inputs2& inputs, int threads) {
  const Shape shape = shape_of(inputs);
  const Weight& weight = matrix.weight();
  require(shape.columns == weight.columns, "the matrix has " + std::to_string(weight.columns) + " columns, the inputs have " +
                                               std::to_string(shape.columns));
  std::unique_ptr<float[]> outputs(new float[static_cast<size_t>(shape.tokens) * weight.rows]);
  {
    nb::gil_scoped_release release;
    Pool pool(threads);
    Activations activations;
    quantize(*pool, inputs.data(), shape.tokens, shape.columns, activation_group(weight), activations);
    multiply(*pool, {{&weight, outputs.get()}}, activations);
  }
  return owned(std::move(outputs), shape.tokens, weight.rows);
}

auto rotate_array(const Inputs2& values, const Bytes& signs, int threads) {
  const Shape shape = shape_of(values);
  require(shape.columns > 0, "there is nothing to rotate");
  require(static_cast<int64_t>(signs.size()) == (shape.columns + 7) / 8, "signs have one bit a column");
  const size_t count = static_cast<size_t>(shape.tokens) * shape.columns;
  std::unique_ptr<float[]> outputs(new float[count]);
  {
    nb::gil_scoped_release release;
    Pool pool(threads);
    memcpy(outputs.get(), values.data(), count * sizeof(float));
    rotate(*pool, outputs.get(), shape.tokens, shape.columns, signs.data());
  }
  return owned(std::move(outputs), shape.tokens, shape.columns);
}

template <typename T>
nb::ndarray<nb::numpy, T, nb::ndim<2>> copied(const T* data, size_t rows, size_t columns, size_t stride) {
  T* raw = new T[rows * columns];
  for (size_t row = 0; row < rows; ++row) memcpy(raw + row * columns, data + row * stride, columns * sizeof(T));
  nb::capsule owner(raw, [](void* p) noexcept { delete[] static_cast<T*>(p); });
  return {raw, {rows, columns}, owner};
}

auto quantize_array(const Inputs2& inputs, int group, int threads, float given, bool whole) {
  const Shape shape = shape_of(inputs);
  require(given == 0.0f || (std::isnormal(given) && given > 0.0f), "a given scale is a normal number above zero");
  require(shape.columns > 0 && group > 0 && group <= shape.columns, "a group has 1 to as many columns as there are");
  Activations a;
  {
    nb::gil_scoped_release release;
    Pool pool(threads);
    quantize(*pool, inputs.data(), shape.tokens, shape.columns, group, a, {given, whole});
  }
  const size_t groups = (shape.columns + group - 1) / group;
  return std::make_tuple(copied(a.values.data(), shape.tokens, shape.columns, a.stride),
                         copied(a.scale.data(), shape.tokens, groups, groups),
                         copied(a.sums.data(), shape.tokens, groups, groups));
}

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

std::vector<double> time_multiply(const Matrices& matrices, const Inputs2& inputs, int threads, int repeats) {
  const Shape shape = shape_of(inputs);
  require(!matrices.empty() && repeats > 0, "nothing to time");
  const Weight& weight = matrices[0]->weight();
  for (const auto& matrix : matrices) {
    const Weight& w = matrix->weight();
    require(w.rows == weight.rows && w.columns == shape.columns && activation_group(w) == activation_group(weight),
            "all matrices need the same shape and groups, and as many columns as the inputs");
  }
  std::vector<double> times(repeats);
  nb::gil_scoped_release release;
  Pool pool(threads);
  std::vector<float> outputs(static_cast<size_t>(shape.tokens) * weight.rows);
  Activations activations;
  for (int i = 0; i < repeats; ++i) {
    const double start = seconds();
    quantize(*pool, inputs.data(), shape.tokens, shape.columns, activation_group(weight), activations);
    multiply(*pool, {{&matrices[i % matrices.size()]->weight(), outputs.data()}}, activations);
    times[i] = seconds() - start;
  }
  return times;
}

std::vector<double> time_read(const std::vector<Bytes>& buffers, int threads, int repeats) {
  require(!buffers.empty() && repeats > 0, "nothing to time");
  constexpr size_t PIECE = 1 << 18;
  std::vector<double> times(repeats);
  std::atomic<uint64_t> total{0};
  nb::gil_scoped_release release;
  Pool pool(threads);
  for (int i = 0; i < repeats; ++i) {
    const Bytes& buffer = buffers[i % buffers.size()];
    const double start = seconds();
    (*pool).each(static_cast<int64_t>((buffer.size() + PIECE - 1) / PIECE), [&](int64_t piece) {
      const size_t first = piece * PIECE, count = std::min(PIECE, buffer.size() - first);
      total += kernels().read(buffer.data() + first, static_cast<int64_t>(count));
    });
    times[i] = seconds() - start;
  }
  return times;
}

}  // namespace
}  // namespace quern

void bind_kernels(nb::module_& module) {
  using namespace quern;
  module.def("isas", &available_isas, "Instruction sets that can run here, best first.");
  module.def("isa", &active_isa, "The instruction set in use.");
  module.def("use_isa", &use_isa, "name"_a, "Use another instruction set from now on.");
  module.def("multiply", &multiply_array, "matrix"_a, "inputs"_a.noconvert(), "threads"_a = 0,
             "inputs (tokens, columns) times the matrix: (tokens, rows).");
  module.def("rotate", &rotate_array, "values"_a.noconvert(), "signs"_a.noconvert(), "threads"_a = 0,
             "Signs and block Hadamard transform of every row.");
  module.def("quantize", &quantize_array, "inputs"_a.noconvert(), "group"_a, "threads"_a = 0, "given"_a = 0.0f,
             "whole"_a = false, "int8 values, scales and sums of the values.");
  module.def("time_multiply", &time_multiply, "matrices"_a, "inputs"_a.noconvert(), "threads"_a, "repeats"_a,
             "Seconds of each of `repeats` products, which take the matrices in turn.");
  module.def("time_read", &time_read, "buffers"_a, "threads"_a, "repeats"_a,
             "Seconds of each of `repeats` times reading a buffer, which take the buffers in turn.");
}
