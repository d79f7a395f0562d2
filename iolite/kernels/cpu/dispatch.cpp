// Which table of kernels is in use, and the C functions that go through it.
//
// build.py defines IOL_HAS_x for the instruction sets that the library is compiled for, and IOL_ABI.
#include <atomic>
#include <cstring>
#include <string>

#include "kernels.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace iol {
namespace avx512 {
extern const iol_kernels kernels;
}
namespace avx2 {
extern const iol_kernels kernels;
}
namespace neon {
extern const iol_kernels kernels;
}
namespace portable {
extern const iol_kernels kernels;
}
}  // namespace iol

namespace {

struct Isa {
    const char* name;
    bool (*runs)();
    const iol_kernels* kernels;
};

#ifdef IOL_HAS_avx512
bool runs_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx2");
}
#endif

#ifdef IOL_HAS_avx2
// Every processor with AVX2 and FMA converts fp16 too (F16C is older than both).
bool runs_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif

#ifdef IOL_HAS_neon
bool runs_neon() {
#if defined(__linux__)
    return getauxval(AT_HWCAP) & (1ul << 20);  // HWCAP_ASIMDDP
#else
    return true;  // every Apple processor that macOS 11 and later runs on
#endif
}
#endif

bool runs_portable() { return true; }

const Isa isas[] = {
#ifdef IOL_HAS_avx512
    {"avx512", runs_avx512, &iol::avx512::kernels},
#endif
#ifdef IOL_HAS_avx2
    {"avx2", runs_avx2, &iol::avx2::kernels},
#endif
#ifdef IOL_HAS_neon
    {"neon", runs_neon, &iol::neon::kernels},
#endif
    {"portable", runs_portable, &iol::portable::kernels},
};

const Isa* best() {
    for (const Isa& isa : isas) {
        if (isa.runs()) return &isa;
    }
    return nullptr;  // not reached: the last one always runs
}

std::atomic<const Isa*>& chosen() {
    static std::atomic<const Isa*> isa{best()};
    return isa;
}

}  // namespace

const iol_kernels& iol_active() { return *chosen().load(std::memory_order_relaxed)->kernels; }

const char* iol_abi(void) { return IOL_ABI; }

const char* iol_isa(void) { return chosen().load()->name; }

const char* iol_isas(void) {
    static const std::string names = [] {
        std::string text;
        for (const Isa& isa : isas) text += std::string(isa.runs() ? "" : "-") + isa.name + " ";
        return text;
    }();
    return names.c_str();
}

int iol_use_isa(const char* name) {
    for (const Isa& isa : isas) {
        if (std::strcmp(isa.name, name)) continue;
        if (!isa.runs()) return 2;
        chosen().store(&isa);
        return 0;
    }
    return 1;
}

#define IOL_FUNCTION(name, parameters, arguments) \
    void iol_##name parameters { iol_active().name arguments; }
IOL_ENTRIES(IOL_FUNCTION)
