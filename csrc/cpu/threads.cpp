#include "threads.h"

#include <pthread.h>

namespace fastkd {

static bool in_child = false;

bool forked() {
    static const int registered = pthread_atfork(nullptr, nullptr, [] { in_child = true; });
    (void)registered;
    return in_child;
}

}  // namespace fastkd
