// The parts of `Kernels` that the files of an instruction set export; what a part leaves out is null.
#pragma once

#include "kernels/kernels.h"

namespace quern {

extern const Kernels scalar_table;
extern const Kernels vectors_avx2, panels_avx2;
extern const Kernels vectors_avx512, panels_avx512;
extern const Kernels panels_amx;
extern const Kernels vectors_neon, panels_neon, panels_i8mm;

}  // namespace quern
