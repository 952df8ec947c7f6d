#include "cpu_features.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace greenroom {

#if defined(__x86_64__)
namespace {

struct Registers {
    unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
    Registers r;
    __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);
    return r;
}

bool bit(unsigned word, int index) { return (word >> index) & 1u; }

// XCR0: the register state the operating system saves.
unsigned long long enabled_state() {
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (static_cast<unsigned long long>(high) << 32) | low;
}

// Linux grants AMX tile data to a process that asks (arch_prctl, Documentation/arch/x86/xstate).
bool request_amx() {
    constexpr long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

}  // namespace

std::vector<std::string> runnable_tiers() {
    std::vector<std::string> tiers{"portable"};
    const Registers one = cpuid(1, 0), seven = cpuid(7, 0), seven1 = cpuid(7, 1);
    if (!bit(one.c, 27)) return tiers;  // no XSAVE
    const auto state = enabled_state();
    const bool avx2 = (state & 0x6) == 0x6 && bit(one.c, 28) && bit(one.c, 12) && bit(one.c, 29) &&
                      bit(seven.b, 5) && bit(seven.b, 8);
    if (!avx2) return tiers;
    tiers.push_back("avx2");
    if (bit(seven1.a, 4)) tiers.push_back("avxvnni");
    const bool avx512 = (state & 0xe6) == 0xe6 && bit(seven.b, 16) && bit(seven.b, 17) &&
                        bit(seven.b, 28) && bit(seven.b, 30) && bit(seven.b, 31) &&
                        bit(seven.c, 11);
    if (!avx512) return tiers;
    tiers.push_back("avx512");
    const bool amx = (state & 0x60000) == 0x60000 && bit(seven.d, 22) && bit(seven.d, 24) &&
                     bit(seven.d, 25) && bit(seven.c, 1) && bit(seven1.a, 5);
    if (amx && request_amx()) tiers.push_back("amx");
    return tiers;
}
#else
std::vector<std::string> runnable_tiers() { return {"portable"}; }
#endif

}  // namespace greenroom
