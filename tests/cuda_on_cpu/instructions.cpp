// What single instructions do, from the manual of PTX: "Matrix fragments for mma.m16n8k32", "ldmatrix", "cp.async".
#include "include/cuda_instructions.h"

#include <cstring>

#include "include/machine.h"
#include "watch.h"

namespace fastkd_machine {

namespace {

struct Element {
    int row, column;
};

// Number i of a lane's registers, a byte of a and b, and a word of c.
Element of_a(int lane, int i) {
    const int group = lane >> 2, in_group = lane % 4;
    const bool upper = i < 4 || (8 <= i && i < 12);
    return {upper ? group : group + 8, i < 8 ? in_group * 4 + (i & 3) : in_group * 4 + (i & 3) + 16};
}
Element of_b(int lane, int i) {
    const int group = lane >> 2, in_group = lane % 4;
    return {i < 4 ? in_group * 4 + (i & 3) : in_group * 4 + (i & 3) + 16, group};
}
Element of_c(int lane, int i) {
    const int group = lane >> 2, in_group = lane % 4;
    return {i < 2 ? group : group + 8, in_group * 2 + (i & 1)};
}

int byte_of(const uint32_t* words, int i) { return static_cast<int8_t>(words[i / 4] >> (i % 4 * 8)); }

struct Operands {
    int rows[16][32], columns[8][32];
};
Operands operands_of_warps[32];

void lay_out(const Words* words, Operands& to) {
    for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 16; ++i) to.rows[of_a(lane, i).row][of_a(lane, i).column] = byte_of(words[lane], i);
        for (int i = 0; i < 8; ++i) to.columns[of_b(lane, i).column][of_b(lane, i).row] = byte_of(words[lane] + 4, i);
    }
}

// The eight rows of a matrix are read at once if no two of them are in the same banks.
void find_conflicts(const Words* rows) {
    for (int matrix = 0; matrix < 4; ++matrix) {
        unsigned banks = 0;
        for (int row = 0; row < 8; ++row) banks |= 1u << (rows[matrix * 8 + row][0] / 16 % 8);
        if (banks != 0xff) watch::report("rows of a matrix in the same banks", nullptr, 16);
    }
}

}  // namespace

void multiply_add(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const void* place) {
    const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    const Gathered all = gather(mine, 6, place);
    Operands& operands = operands_of_warps[all.warp];
    if (all.first) lay_out(all.words, operands);
    for (int i = 0; i < 4; ++i) {
        const Element e = of_c(lane(), i);
        int64_t sum = c[i];
        for (int k = 0; k < 32; ++k) sum += operands.rows[e.row][k] * operands.columns[e.column][k];
        if (sum != static_cast<int>(sum)) watch::report("a sum leaves 32 bits", nullptr, 0);
        c[i] = static_cast<int>(sum);
    }
}

// Threads 0 to 7 have the addresses of the rows of the first matrix, 8 to 15 of the second, and so on.
void load_matrices(uint32_t (&words)[4], const void* row, const void* place) {
    const auto address = reinterpret_cast<uint64_t>(row);
    const uint32_t mine[2] = {static_cast<uint32_t>(address), static_cast<uint32_t>(address >> 32)};
    if (address % 16 != 0) watch::report("misaligned access", row, 16);
    const Gathered gathered = gather(mine, 2, place);
    const Words* all = gathered.words;
    if (gathered.first) find_conflicts(all);
    for (int matrix = 0; matrix < 4; ++matrix) {
        const uint32_t* from = all[matrix * 8 + lane() / 4];
        const uint64_t begin = (static_cast<uint64_t>(from[1]) << 32 | from[0]) + static_cast<unsigned>(lane() % 4 * 4);
        watch::access(begin, 4, false);
        std::memcpy(&words[matrix], reinterpret_cast<const void*>(begin), 4);
    }
}

// The source is read here, and the bytes arrive as late as they may.
void copy(void* shared, const void* global, unsigned bytes, unsigned given) {
    for (const void* address : {static_cast<const void*>(shared), global}) {
        if (reinterpret_cast<uintptr_t>(address) % bytes != 0) watch::report("misaligned access", address, bytes);
    }
    if (given > 0) watch::access(reinterpret_cast<uintptr_t>(global), given, false);
    watch::begin_copy(reinterpret_cast<uintptr_t>(shared), bytes);
    copies_of_thread().back().push_back({shared, global, bytes, given});
}

void close_copies() { copies_of_thread().emplace_back(); }

void wait_for_copies(unsigned latest) {
    auto& groups = copies_of_thread();
    while (groups.size() > latest + 1) {
        for (const Copy& copy : groups.front()) {
            watch::end_copy(reinterpret_cast<uintptr_t>(copy.to), copy.bytes);
            std::memset(copy.to, 0, copy.bytes);
            std::memcpy(copy.to, copy.from, copy.given);
        }
        groups.erase(groups.begin());
    }
}

float from_float16(uint16_t bits) {
    _Float16 x;
    std::memcpy(&x, &bits, sizeof x);
    return static_cast<float>(x);
}

uint16_t to_float16(float x) {
    const auto half = static_cast<_Float16>(x);
    uint16_t bits;
    std::memcpy(&bits, &half, sizeof bits);
    return bits;
}

uint16_t to_bfloat16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return x != x ? uint16_t{0x7fff} : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace fastkd_machine
