// The Python module quern._native. Each part of the native code has a file here that shows it.
#include <nanobind/nanobind.h>

#include "kernels/dispatch.h"

namespace nb = nanobind;

void bind_kernels(nb::module_& module);
void bind_rounding(nb::module_& module);
void bind_trellis(nb::module_& module);
void bind_engine(nb::module_& module);

NB_MODULE(_native, module) {
  nb::register_exception_translator([](const std::exception_ptr& thrown, void*) {
    try {
      std::rethrow_exception(thrown);
    } catch (const quern::BadEnvironment& error) {
      PyErr_SetString(nb::module_::import_("quern.core.errors").attr("UserError").ptr(), error.what());
    }
  });
  module.doc() = "Kernels, loops of rounding, trellis encoder and CPU engine of quern";
  bind_kernels(module);
  bind_rounding(module);
  bind_trellis(module);
  bind_engine(module);
}
