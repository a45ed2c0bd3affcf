#include "threads.h"

#include <pthread.h>

namespace fastkd {

static bool in_child = false;

// As the extension is loaded: whoever starts the pool, torch included, a fork comes later.
[[maybe_unused]] static const int registered = pthread_atfork(nullptr, nullptr, [] { in_child = true; });

bool forked() { return in_child; }

}  // namespace fastkd
