// An instantiation by name: what the generated units make, and the harness looks up.

#pragma once

#include "launch.h"

namespace w4a16::decode {

struct Config {
    const char *name;
    Kernel kernel;
};

} // namespace w4a16::decode
