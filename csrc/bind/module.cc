// The Python module quern._native. Each part of the native code has a file here that shows it.
#include <nanobind/nanobind.h>

namespace nb = nanobind;

void bind_kernels(nb::module_& module);
void bind_trellis(nb::module_& module);
void bind_engine(nb::module_& module);

NB_MODULE(_native, module) {
  module.doc() = "Kernels, trellis encoder and CPU engine of quern";
  bind_kernels(module);
  bind_trellis(module);
  bind_engine(module);
}
