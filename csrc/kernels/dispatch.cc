#include "kernels/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "kernels/isas.h"
#include "kernels/tables.h"

#if QUERN_ARM
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#if QUERN_X86
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace quern {
namespace {

#if QUERN_X86

struct Registers {
  uint32_t a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r;
  if (!__get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d)) return {};
  return r;
}

bool has(uint32_t word, std::initializer_list<int> bits) {
  for (int bit : bits)
    if (!(word >> bit & 1)) return false;
  return true;
}

// Register files that the operating system saves at a task switch.
uint64_t saved_state() {
  if (!has(cpuid(1, 0).c, {27})) return 0;  // OSXSAVE
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

bool can_avx2() {
  const uint32_t c1 = cpuid(1, 0).c;
  return has(c1, {12, 28, 29}) && has(cpuid(7, 0).b, {5}) && (saved_state() & 0x6) == 0x6;  // FMA, AVX, F16C; AVX2
}

#if QUERN_X86_WIDE

bool can_avx512() {
  const Registers r = cpuid(7, 0);
  return can_avx2() && has(r.b, {16, 17, 30, 31})        // F, DQ, BW, VL
         && has(r.c, {1, 8, 11})                         // VBMI, GFNI, VNNI
         && (saved_state() & 0xe6) == 0xe6;
}

bool can_amx() {
  if (!can_avx512() || !has(cpuid(7, 0).d, {24, 25}) || (saved_state() & 0x60000) != 0x60000) return false;  // TILE, INT8
#if defined(__linux__)
  // Tile data is 8 KiB a thread, so Linux gives it to those processes only that ask (ARCH_REQ_XCOMP_PERM, XTILEDATA).
  static const bool granted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  return granted;
#else
  return false;
#endif
}

#endif
#endif

#if QUERN_ARM

bool can_neon() { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }  // with SDOT
bool can_i8mm() { return can_neon() && (getauxval(AT_HWCAP2) & HWCAP2_I8MM) != 0; }

#endif

// Fill what `table` leaves out from `lower`.
Kernels completed(const Kernels& table, const Kernels& lower) {
  Kernels k = lower;
  k.name = table.name;
  const auto take = [](auto& mine, auto theirs) {
    if (theirs) mine = theirs;
  };
  take(k.quantize, table.quantize);
  take(k.split, table.split);
  take(k.rotate, table.rotate);
  take(k.scales, table.scales);
  take(k.read, table.read);
  take(k.flush, table.flush);
  take(k.minimums, table.minimums);
  if (table.panel) {  // these belong together
    k.panel = table.panel;
    k.grouped = table.grouped;
    k.flip = table.flip;
  }
  return k;
}

// Every table that can run here, lowest first.
const std::vector<Kernels>& tables() {
  static const std::vector<Kernels> all = [] {
    std::vector<Kernels> found{scalar_table};
    [[maybe_unused]] const auto add = [&](std::initializer_list<const Kernels*> parts) {
      Kernels table = found.back();
      for (const Kernels* part : parts) table = completed(*part, table);
      table.level = static_cast<int32_t>(found.size());
      found.push_back(table);
    };
#if QUERN_X86
    if (can_avx2()) add({&vectors_avx2, &panels_avx2});
#endif
#if QUERN_X86_WIDE
    if (can_avx512()) add({&vectors_avx512, &panels_avx512});
    if (can_amx()) add({&panels_amx});
#endif
#if QUERN_ARM
    if (can_neon()) add({&vectors_neon, &panels_neon});
    if (can_i8mm()) add({&panels_i8mm});
#endif
    return found;
  }();
  return all;
}

std::string listed() {
  std::string names;
  for (const std::string& name : available_isas()) names += (names.empty() ? "" : ", ") + name;
  return names;
}

const Kernels* find(const std::string& name) {
  for (const Kernels& table : tables())
    if (name == table.name) return &table;
  throw std::invalid_argument("instruction set '" + name + "' is unknown or not available on this machine; it has: " +
                              listed());
}

const Kernels* initial() {
  const char* name = std::getenv("QUERN_ISA");
  if (name == nullptr || *name == '\0') return &tables().back();
  try {
    return find(name);
  } catch (const std::invalid_argument& error) {
    throw BadEnvironment(std::string("QUERN_ISA: ") + error.what());
  }
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* table = chosen.load(std::memory_order_acquire);
  if (table == nullptr) {
    table = initial();
    chosen.store(table, std::memory_order_release);
  }
  return *table;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (auto table = tables().rbegin(); table != tables().rend(); ++table) names.emplace_back(table->name);
  return names;
}

std::string active_isa() { return kernels().name; }

void use_isa(const std::string& name) { chosen.store(find(name), std::memory_order_release); }

}  // namespace quern
