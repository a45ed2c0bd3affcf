#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fastkd {

#if defined(__x86_64__)
// Made here, in a unit that runs on any processor.
static InstructionSet with_vnni() {
    InstructionSet set = avx512;
    set.name = "avx512vnni", set.supported = avx512vnni_supported, set.int8 = avx512vnni_int8;
    return set;
}
static const InstructionSet avx512vnni = with_vnni();
static const InstructionSet* const kSets[] = {&avx512vnni, &avx512, &avx2, &generic};
#else
static const InstructionSet* const kSets[] = {&generic};
#endif

static const InstructionSet& choose() {
    const char* forced = std::getenv("FASTKD_CPU_ISA");
    std::string names;
    for (const InstructionSet* set : kSets) {
        names += (names.empty() ? "" : ", ") + std::string(set->name);
        if (forced == nullptr || *forced == '\0') {
            if (set->supported()) return *set;
        } else if (std::string(forced) == set->name) {
            if (set->supported()) return *set;
            throw std::runtime_error("FASTKD_CPU_ISA=" + std::string(forced) + ": this processor does not have it");
        }
    }
    throw std::runtime_error("FASTKD_CPU_ISA must be one of " + names + ", got '" + std::string(forced) + "'");
}

const InstructionSet& active_instruction_set() {
    static const InstructionSet& chosen = choose();
    return chosen;
}

}  // namespace fastkd
