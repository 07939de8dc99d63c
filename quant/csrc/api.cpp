// Contexts, and the choice of the instruction set at run time.
#include <cstring>
#include <system_error>

#include "context.h"

#ifndef PM_SOURCE_HASH
#define PM_SOURCE_HASH ""
#endif

#if defined(PM_ARM64) && defined(__linux__)
#include <sys/auxv.h>
#endif
#ifdef PM_X86
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

namespace pm {

#ifdef PM_X86
namespace {

struct CpuId {
    uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

CpuId cpuid(uint32_t leaf, uint32_t subleaf) {
    CpuId r;
#if defined(_MSC_VER)
    int words[4];
    __cpuidex(words, static_cast<int>(leaf), static_cast<int>(subleaf));
    r.eax = words[0], r.ebx = words[1], r.ecx = words[2], r.edx = words[3];
#else
    __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
#endif
    return r;
}

// The register states that the operating system saves: bits 1-2 SSE and AVX, 5-7 AVX-512.
uint64_t saved_states() {
    if (!(cpuid(1, 0).ecx >> 27 & 1)) return 0;
#if defined(_MSC_VER)
    return _xgetbv(0);
#else
    uint32_t low, high;
    __asm__ __volatile__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return static_cast<uint64_t>(high) << 32 | low;
#endif
}

}  // namespace

namespace {

struct Features {
    bool avx2, avxvnni, avx512vnni;
};

Features detect() {
    const uint32_t fma_f16c = 1u << 12 | 1u << 29, f_dq_bw_vl = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
    const uint64_t saved = saved_states();
    const CpuId leaf7 = cpuid(7, 0);
    Features f;
    f.avx2 = (saved & 0x6) == 0x6 && (cpuid(1, 0).ecx & fma_f16c) == fma_f16c && (leaf7.ebx >> 5 & 1);
    f.avxvnni = f.avx2 && (cpuid(7, 1).eax >> 4 & 1);
    f.avx512vnni = f.avx2 && (saved & 0xE6) == 0xE6 && (leaf7.ebx & f_dq_bw_vl) == f_dq_bw_vl && (leaf7.ecx >> 11 & 1);
    return f;
}

// Once: in a virtual machine every cpuid costs tens of microseconds.
const Features& features() {
    static const Features found = detect();
    return found;
}

}  // namespace

bool cpu_has_avx2() { return features().avx2; }
bool cpu_has_avxvnni() { return features().avxvnni; }
bool cpu_has_avx512vnni() { return features().avx512vnni; }
#endif

#ifdef PM_ARM64
bool cpu_has_dot_product() {
#if defined(__APPLE__)
    return true;  // all of Apple's ARM Macs
#elif defined(__linux__)
    return getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
#else
    return false;
#endif
}
#endif

namespace {

const Isa* const ISAS[] = {
#ifdef PM_X86
#ifndef PM_WITHOUT_ISA_AVX512  // this and the next two: the compiler was too old
    &isa_avx512,
#endif
#ifndef PM_WITHOUT_ISA_AVXVNNI
    &isa_avxvnni,
#endif
#ifndef PM_WITHOUT_ISA_AVX2
    &isa_avx2,
#endif
#endif
#if defined(PM_ARM64) && !defined(PM_WITHOUT_ISA_NEON)
    &isa_neon,
#endif
    &isa_portable,
};
constexpr int32_t N_ISAS = sizeof ISAS / sizeof *ISAS;

// The usable instruction set of that name, or the best one for no name; null if there is none.
const Isa* find_isa(const char* name) {
    for (const Isa* isa : ISAS)
        if (isa->usable() && (!name || std::strcmp(name, isa->name) == 0)) return isa;
    return nullptr;
}

}  // namespace
}  // namespace pm

extern "C" {

int32_t pm_abi_version(void) { return PM_ABI_VERSION; }

const char* pm_source_hash(void) { return PM_SOURCE_HASH; }

const char* pm_isa_name(int32_t index) { return index >= 0 && index < pm::N_ISAS ? pm::ISAS[index]->name : nullptr; }

int32_t pm_isa_usable(int32_t index) { return index >= 0 && index < pm::N_ISAS && pm::ISAS[index]->usable(); }

pm_context* pm_create(int32_t threads, const char* isa) try {
    const pm::Isa* const found = pm::find_isa(isa);
    if (!found) return nullptr;
    std::unique_ptr<pm_context> context(new pm_context);
    context->isa = found;
    context->pool.reset(new pm::Pool(threads));
    return context.release();
} catch (const std::exception&) {
    return nullptr;
}

void pm_destroy(pm_context* context) { delete context; }

int32_t pm_set_isa(pm_context* context, const char* isa) {
    const pm::Isa* const found = pm::find_isa(isa);
    if (!found) return PM_BAD_ARGUMENT;
    const std::lock_guard<std::mutex> lock(context->mutex);
    context->isa = found;
    return PM_OK;
}

const char* pm_context_isa(const pm_context* context) { return context->isa->name; }

int32_t pm_set_threads(pm_context* context, int32_t threads) try {
    if (threads < 1) return PM_BAD_ARGUMENT;
    const std::lock_guard<std::mutex> lock(context->mutex);
    if (context->pool->threads() != threads) context->pool.reset(new pm::Pool(threads));
    return PM_OK;
} catch (const std::exception&) {
    return PM_OUT_OF_MEMORY;
}

}  // extern "C"
