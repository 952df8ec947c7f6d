// Waiting for a 32-bit word to change, the short way (a pause instruction) and the long way
// (asleep in the kernel).
#pragma once

#include <atomic>
#include <cstdint>

#if defined(__linux__)
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#endif

namespace greenroom {

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

// The processor this thread runs on; -1 where the system does not tell.
inline int current_cpu() {
#if defined(__linux__)
    return sched_getcpu();
#else
    return -1;
#endif
}

#if defined(__linux__)
static_assert(sizeof(std::atomic<std::uint32_t>) == 4, "a futex is a plain 32-bit word");

// Returns when woken, when the word is not `seen`, or for no reason: check again.
inline void park(std::atomic<std::uint32_t>& word, std::uint32_t seen) {
    syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
}

inline void unpark_all(std::atomic<std::uint32_t>& word) {
    syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}
#else
inline void park(std::atomic<std::uint32_t>& word, std::uint32_t seen) { word.wait(seen); }
inline void unpark_all(std::atomic<std::uint32_t>& word) { word.notify_all(); }
#endif

}  // namespace greenroom
