// How many threads are worth starting here: the processors this process may use, the
// physical cores among them, and the processor quota of its control group.
#pragma once

#include <string>
#include <vector>

namespace greenroom {

struct ThreadAdvice {
    int threads = 1;        // the recommendation
    int allowed = 1;        // logical processors in the affinity mask
    int cores = 1;          // physical cores among them
    double quota = 0;       // processors the control group grants; 0: no limit
    std::vector<int> cpus;  // one allowed logical processor per physical core
    std::string reason;     // one line for the user
};

// Logical processors in this process's affinity mask; at least 1.
int allowed_cpus();

// `root` replaces the directory under which /sys and /proc are read (for tests).
ThreadAdvice advise_threads(const std::string& root = "");

}  // namespace greenroom
