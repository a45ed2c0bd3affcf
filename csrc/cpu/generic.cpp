#include "isa.h"
#include "logit-inl.h"

namespace fastkd {

static bool supported() {
    return true;
}

const InstructionSet generic = {"generic", supported, {statistics, divergence, gradient, unmatched, best}};

}  // namespace fastkd
