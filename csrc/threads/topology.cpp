#include "threads/topology.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif

namespace greenroom {
namespace {

// The lines of a small file; none if it cannot be read. C's own files: beside another library
// that exports its own copy of the C++ streams, ours could call into that and crash.
std::vector<std::string> lines_of(const std::string& path) {
    std::vector<std::string> lines;
    std::FILE* file = std::fopen(path.c_str(), "r");
    if (file == nullptr) return lines;
    std::string line;
    for (int c; (c = std::fgetc(file)) != EOF && lines.size() < 1024;) {
        if (c != '\n') {
            line.push_back(static_cast<char>(c));
            continue;
        }
        lines.push_back(line);
        line.clear();
    }
    if (!line.empty()) lines.push_back(line);
    std::fclose(file);
    return lines;
}

// The first line of a file; empty if it cannot be read.
std::string first_line(const std::string& path) {
    const auto lines = lines_of(path);
    return lines.empty() ? std::string() : lines.front();
}

std::vector<int> allowed_list() {
    std::vector<int> cpus;
#if defined(__linux__)
    cpu_set_t set;
    CPU_ZERO(&set);
    if (sched_getaffinity(0, sizeof set, &set) == 0)
        for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
            if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
#endif
    // More than CPU_SETSIZE processors, or another system: take what the library says.
    if (cpus.empty())
        for (unsigned cpu = 0; cpu < std::max(1u, std::thread::hardware_concurrency()); ++cpu)
            cpus.push_back(static_cast<int>(cpu));
    return cpus;
}

// One of `allowed` per physical core. Siblings are named by a list such as "0,64" or "0-1",
// the same text for each of them; a processor without one counts as a core.
std::vector<int> one_per_core(const std::string& root, const std::vector<int>& allowed) {
    std::vector<int> chosen;
    std::vector<std::string> seen;
    for (int cpu : allowed) {
        const std::string siblings =
            first_line(root + "/sys/devices/system/cpu/cpu" + std::to_string(cpu) +
                       "/topology/thread_siblings_list");
        if (!siblings.empty()) {
            if (std::find(seen.begin(), seen.end(), siblings) != seen.end()) continue;
            seen.push_back(siblings);
        }
        chosen.push_back(cpu);
    }
    return chosen;
}

// quota / period, or 0 where there is no limit.
double ratio(const std::string& quota, const std::string& period) {
    const double q = std::atof(quota.c_str()), p = std::atof(period.c_str());
    return q > 0 && p > 0 ? q / p : 0;
}

double quota_in(const std::string& folder) {
    const std::string v2 = first_line(folder + "/cpu.max");  // "max 100000" or "150000 100000"
    const auto space = v2.find(' ');
    if (space != std::string::npos) return ratio(v2.substr(0, space), v2.substr(space + 1));
    return ratio(first_line(folder + "/cpu.cfs_quota_us"),
                 first_line(folder + "/cpu.cfs_period_us"));
}

// The smallest quota on the way from a control group up to the root of its tree.
double quota_on_path(const std::string& mount, std::string group) {
    double least = 0;
    while (true) {
        const double here = quota_in(mount + group);
        if (here > 0 && (least == 0 || here < least)) least = here;
        const auto slash = group.find_last_of('/');
        if (slash == std::string::npos) return least;
        group.resize(slash);
    }
}

// Lines of /proc/self/cgroup are "id:controllers:path"; version 2 has no controllers.
double cgroup_quota(const std::string& root) {
    double least = 0;
    const auto note = [&](double quota) {
        if (quota > 0 && (least == 0 || quota < least)) least = quota;
    };
    const std::string tree = root + "/sys/fs/cgroup";
    for (const std::string& line : lines_of(root + "/proc/self/cgroup")) {
        const auto first = line.find(':'), second = line.find(':', first + 1);
        if (second == std::string::npos) continue;
        std::string controllers = ",";
        controllers.append(line, first + 1, second - first - 1).push_back(',');
        std::string path = line.substr(second + 1);
        if (path == "/") path.clear();
        if (controllers == ",,") note(quota_on_path(tree, path));
        if (controllers.find(",cpu,") == std::string::npos) continue;
        note(quota_on_path(tree + "/cpu", path));
        note(quota_on_path(tree + "/cpu,cpuacct", path));
    }
    return least;
}

std::string explain(const ThreadAdvice& advice) {
    std::string text = std::to_string(advice.threads);
    text += advice.threads == 1 ? " thread: " : " threads: ";
    text += std::to_string(advice.cores) + " physical core" + (advice.cores == 1 ? "" : "s");
    if (advice.allowed != advice.cores)
        text += " among " + std::to_string(advice.allowed) + " allowed logical processors";
    if (advice.quota > 0) {
        char quota[32];
        std::snprintf(quota, sizeof quota, "%g", advice.quota);
        text += std::string(", control group quota of ") + quota + " processors";
    }
    return text;
}

}  // namespace

int allowed_cpus() { return static_cast<int>(allowed_list().size()); }

ThreadAdvice advise_threads(const std::string& root) {
    const std::vector<int> allowed = allowed_list();
    ThreadAdvice advice;
    advice.allowed = static_cast<int>(allowed.size());
    advice.cpus = one_per_core(root, allowed);
    advice.cores = static_cast<int>(advice.cpus.size());
    advice.quota = cgroup_quota(root);
    advice.threads = advice.cores;
    // A fraction of a processor would have every thread stopped for part of each period.
    if (advice.quota > 0)
        advice.threads = std::clamp(static_cast<int>(std::floor(advice.quota)), 1, advice.cores);
    advice.reason = explain(advice);
    return advice;
}

}  // namespace greenroom
