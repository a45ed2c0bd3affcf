#include "include/machine.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "watch.h"

fastkd_machine::Triple threadIdx, blockIdx, blockDim, gridDim;

namespace fastkd_machine {

namespace {

constexpr size_t kStack = 64 << 10;
constexpr unsigned kWarp = 32, kMostThreads = 1024;

enum class State { ready, at_barrier, at_warp, done };

struct Thread {
    ucontext_t context;  // until it runs
    jmp_buf place_left;  // afterwards: unlike a context, it leaves the mask of signals to nobody
    bool runs;
    State state;
    Triple index;
    const void* place;  // where it waits
    unsigned mask;      // for whom, among its warp
    uint64_t given;
    Words words;
    std::vector<std::vector<Copy>> copies;
};

Thread threads[kMostThreads];
uint64_t exchanged[kMostThreads];  // what the lanes of a warp gave, from its last shuffle
Words gathered[kMostThreads];      // the same, of several words
bool untouched[kMostThreads / kWarp];  // by the lanes of a warp
unsigned running, count;
jmp_buf scheduler;
std::unique_ptr<char[]> stacks;
Body current_body;
void* current_call;

void enter() {
    watch::checking = true;
    current_body(current_call);
    watch::checking = false;
    for (const auto& group : threads[running].copies) {
        if (!group.empty()) watch::report("a thread ends before its copies", group.front().to, group.front().bytes);
    }
    threads[running].state = State::done;
    _longjmp(scheduler, 1);
}

void wait(State state, const void* place) {
    Thread& thread = threads[running];
    thread.state = state, thread.place = place;
    watch::checking = false;
    if (_setjmp(thread.place_left) == 0) _longjmp(scheduler, 1);
    watch::checking = true;
}

void resume(unsigned t) {
    running = t;
    threadIdx = threads[t].index;
    watch::set_thread(t, stacks.get() + t * kStack, kStack);
    if (_setjmp(scheduler) != 0) return;
    if (threads[t].runs) _longjmp(threads[t].place_left, 1);
    threads[t].runs = true;
    setcontext(&threads[t].context);
}

// Lets those of a warp go on who wait for one another, if they all came, to the same place.
bool release_warp(unsigned first) {
    bool released = false;
    for (unsigned t = first; t < std::min(first + kWarp, count); ++t) {
        const unsigned mask = threads[t].mask;
        if (threads[t].state != State::at_warp) continue;
        bool all = mask >> (t - first) & 1;
        for (unsigned lane = 0; lane < kWarp; ++lane) {
            if (!(mask >> lane & 1)) continue;
            const unsigned other = first + lane;
            all = all && other < count && threads[other].state == State::at_warp && threads[other].mask == mask &&
                  threads[other].place == threads[t].place;
        }
        if (!all) continue;
        untouched[first / kWarp] = true;
        for (unsigned lane = 0; lane < kWarp; ++lane) {
            if (!(mask >> lane & 1)) continue;
            exchanged[first + lane] = threads[first + lane].given, threads[first + lane].state = State::ready;
            std::memcpy(gathered[first + lane], threads[first + lane].words, sizeof(Words));
        }
        released = true;
    }
    return released;
}

bool release_block() {
    for (unsigned t = 0; t < count; ++t) {
        if (threads[t].state != State::at_barrier || threads[t].place != threads[0].place) return false;
    }
    for (unsigned t = 0; t < count; ++t) threads[t].state = State::ready;
    watch::next_epoch();
    return true;
}

bool release() {
    bool released = false;
    for (unsigned first = 0; first < count; first += kWarp) released |= release_warp(first);
    return released || release_block();
}

// False if the threads wait for what does not come.
bool run_block(Triple block, std::mt19937& order) {
    blockDim = block;
    count = block.x * block.y * block.z;
    std::vector<unsigned> turn(count);
    std::iota(turn.begin(), turn.end(), 0u);
    for (unsigned t = 0; t < count; ++t) {
        Thread& thread = threads[t];
        thread.state = State::ready, thread.runs = false, thread.copies.assign(1, {});
        thread.index = {t % block.x, t / block.x % block.y, t / block.x / block.y};
        getcontext(&thread.context);
        thread.context.uc_stack = {stacks.get() + t * kStack, 0, kStack};
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, enter, 0);
    }
    watch::new_block();
    for (;;) {
        if (watch::seed != 0) std::shuffle(turn.begin(), turn.end(), order);
        for (unsigned t : turn) {
            if (threads[t].state == State::ready) resume(t);
        }
        if (std::all_of(threads, threads + count, [](const Thread& t) { return t.state == State::done; })) return true;
        const bool any = std::any_of(threads, threads + count, [](const Thread& t) { return t.state == State::ready; });
        if (!any && !release()) {
            watch::report("threads wait for others that do not come", nullptr, 0);
            return false;
        }
    }
}

}  // namespace

int lane() { return static_cast<int>(running % kWarp); }

void barrier(const void* place) { wait(State::at_barrier, place); }

uint64_t shuffle(unsigned mask, uint64_t bits, int from, const void* place) {
    threads[running].mask = mask, threads[running].given = bits;
    wait(State::at_warp, place);
    if (from < 0 || from >= static_cast<int>(kWarp) || !(mask >> from & 1)) watch::report("a lane outside of the mask is asked", nullptr, 0);
    return exchanged[running / kWarp * kWarp + from % kWarp];
}

unsigned ballot(unsigned mask, bool yes, const void* place) {
    shuffle(mask, yes, lane(), place);
    unsigned votes = 0;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
        if (mask >> lane & 1) votes |= static_cast<unsigned>(exchanged[running / kWarp * kWarp + lane]) << lane;
    }
    return votes;
}

Gathered gather(const uint32_t* words, int count, const void* place) {
    std::memcpy(threads[running].words, words, static_cast<size_t>(count) * sizeof(uint32_t));
    shuffle(0xffffffffu, 0, lane(), place);
    const unsigned warp = running / kWarp;
    return {gathered + warp * kWarp, warp, std::exchange(untouched[warp], false)};
}

std::vector<std::vector<Copy>>& copies_of_thread() { return threads[running].copies; }

int launch(Triple grid, Triple block, Body body, void* call, size_t call_size) {
    constexpr unsigned kMostX = 0x7fffffff, kMostYZ = 65535;
    ++watch::launches;
    if (watch::fails_at == watch::launches) return 100;  // cudaErrorNoDevice
    const uint64_t per_block = uint64_t{block.x} * block.y * block.z;
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || per_block == 0 || per_block > kMostThreads || block.z > 64 || grid.x > kMostX ||
        grid.y > kMostYZ || grid.z > kMostYZ) {
        return 9;  // cudaErrorInvalidConfiguration
    }
    if (!stacks) stacks = std::make_unique<char[]>(kMostThreads * kStack);
    current_body = body, current_call = call;
    gridDim = grid;
    watch::new_launch(call, call_size);
    // Blocks come in any order, too.
    const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
    std::vector<uint64_t> turn(blocks);
    std::iota(turn.begin(), turn.end(), uint64_t{0});
    std::mt19937 order(watch::seed);
    if (watch::seed != 0) std::shuffle(turn.begin(), turn.end(), order);
    for (uint64_t b : turn) {
        blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y), static_cast<unsigned>(b / grid.x / grid.y)};
        if (!run_block(block, order)) break;
    }
    return 0;
}

}  // namespace fastkd_machine
