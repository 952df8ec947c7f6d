// Which instruction-set tiers this processor and operating system can run.
#pragma once

#include <string>
#include <vector>

namespace greenroom {

// Names of the runnable tiers, plainest first; "portable" is always among them.
std::vector<std::string> runnable_tiers();

}  // namespace greenroom
