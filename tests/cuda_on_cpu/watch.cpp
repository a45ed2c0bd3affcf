#include "watch.h"

#include <cstring>
#include <cstdio>

#include "include/machine.h"

// The linker's: the image of this module, and in it the shared memory.
extern "C" {
#define HIDDEN __attribute__((visibility("hidden")))
extern HIDDEN char __ehdr_start, _end, __start_cuda_shared[], __stop_cuda_shared[];
}

namespace fastkd_machine::watch {

bool checking = false;
unsigned seed = 0;
int64_t launches = 0, fails_at = -1;

namespace {

constexpr size_t kWord = 2, kMostReports = 20;
constexpr uint32_t kNobody = 0, kSeveral = 0xffffffff;

// Who touched a word last. `epoch` grows with every barrier, block and launch; nothing of an older one conflicts, except
// that blocks of one launch have no barrier between them: `block_epoch` is where the block began, `launch_epoch` the launch.
struct Word {
    uint64_t block = 0;  // shared memory is new in each
    uint64_t written_at = 0, read_at = 0;
    uint64_t blocks_read_at = 0;                  // the launch in which several blocks read it
    uint32_t writer = kNobody, reader = kNobody;  // thread + 1
    bool initialised = false;
    bool arriving = false;  // a copy may write it at any time
};

struct Buffer {
    uintptr_t begin, end;
    std::vector<Word> words;
};

std::vector<Buffer> buffers;
std::vector<Word> shared;
std::vector<std::string> found;
uint64_t epoch = 1, block_epoch = 1, launch_epoch = 1;
uint32_t me = 0;
uintptr_t stack_begin = 0, stack_end = 0, call_begin = 0, call_end = 0;

uintptr_t shared_begin() { return reinterpret_cast<uintptr_t>(__start_cuda_shared); }
uintptr_t shared_end() { return reinterpret_cast<uintptr_t>(__stop_cuda_shared); }

// Did another thread of this launch do that with no barrier between?
bool conflicts(uint32_t who, uint64_t when) {
    if (who == kNobody || when < launch_epoch) return false;
    if (when < block_epoch) return true;   // another block
    return when == epoch && who != me;     // this block, since its last barrier
}

void touch(Word& word, bool write, uintptr_t address) {
    const void* where = reinterpret_cast<const void*>(address);
    if (word.arriving) report(write ? "write what is being copied" : "read what is being copied", where, kWord);
    if (conflicts(word.writer, word.written_at)) report(write ? "two threads write" : "read what another thread writes", where, kWord);
    if (write) {
        const bool read = conflicts(word.reader, word.read_at) || word.blocks_read_at == launch_epoch;
        if (read) report("write what another thread reads", where, kWord);
        word.writer = me, word.written_at = epoch, word.initialised = true;
        return;
    }
    if (!word.initialised) report("read what nobody wrote", where, kWord);
    const bool before = word.reader != kNobody && word.read_at >= launch_epoch;
    if (before && word.read_at < block_epoch) word.blocks_read_at = launch_epoch;
    word.reader = before && word.read_at == epoch && word.reader != me ? kSeveral : me;
    word.read_at = epoch;
}

bool is_shared(uintptr_t begin, size_t bytes) { return begin >= shared_begin() && begin + bytes <= shared_end(); }

Word& shared_word(uintptr_t address) {
    Word& word = shared[(address - shared_begin()) / kWord];
    if (word.block != block_epoch) word = Word{}, word.block = block_epoch;
    return word;
}

}  // namespace

void access(uintptr_t begin, size_t bytes, bool write) {
    if (!checking || (begin >= stack_begin && begin < stack_end)) return;
    const uintptr_t end = begin + bytes;
    if (is_shared(begin, bytes)) {
        for (uintptr_t a = begin / kWord * kWord; a < end; a += kWord) touch(shared_word(a), write, a);
        return;
    }
    if (buffers.empty()) return;  // the caller does not say what there is
    for (Buffer& buffer : buffers) {
        if (begin < buffer.begin || end > buffer.end) continue;
        if (begin % bytes != 0) report("misaligned access", reinterpret_cast<void*>(begin), bytes);
        for (uintptr_t a = begin / kWord * kWord; a < end; a += kWord) touch(buffer.words[(a - buffer.begin) / kWord], write, a);
        return;
    }
    const bool constant = begin >= reinterpret_cast<uintptr_t>(&__ehdr_start) && end <= reinterpret_cast<uintptr_t>(&_end);
    const bool argument = begin >= call_begin && end <= call_end;
    if (write || !(constant || argument)) report(write ? "write out of bounds" : "read out of bounds", reinterpret_cast<void*>(begin), bytes);
}

// Asking for a copy is a write, and so is its arrival; what is there between is neither old nor new.
void begin_copy(uintptr_t to, size_t bytes) {
    if (!is_shared(to, bytes)) return report("copy to no shared memory", reinterpret_cast<void*>(to), bytes);
    access(to, bytes, true);
    std::memset(reinterpret_cast<void*>(to), 0xff, bytes);
    for (uintptr_t a = to; a < to + bytes; a += kWord) shared_word(a).arriving = true;
}

void end_copy(uintptr_t to, size_t bytes) {
    if (!is_shared(to, bytes)) return;
    for (uintptr_t a = to; a < to + bytes; a += kWord) shared_word(a).arriving = false;
    access(to, bytes, true);
}

void add_buffer(uintptr_t begin, size_t bytes, bool filled) {
    Word word;
    word.initialised = filled;
    buffers.push_back({begin, begin + bytes, std::vector<Word>(bytes / kWord + 2, word)});
}

void forget() { buffers.clear(), found.clear(), launches = 0; }

const std::vector<std::string>& reports() { return found; }

void new_launch(const void* call, size_t call_size) {
    launch_epoch = ++epoch;
    call_begin = reinterpret_cast<uintptr_t>(call), call_end = call_begin + call_size;
}

void new_block() {
    block_epoch = ++epoch;
    shared.resize((shared_end() - shared_begin()) / kWord + 1);
    // Nobody zeroes it: NaN, and the largest integers.
    std::memset(__start_cuda_shared, 0xff, shared_end() - shared_begin());
}

void next_epoch() { ++epoch; }

void set_thread(unsigned thread, const char* stack, size_t bytes) {
    me = thread + 1;
    stack_begin = reinterpret_cast<uintptr_t>(stack), stack_end = stack_begin + bytes;
}

void report(const char* what, const void* address, size_t bytes) {
    if (found.size() >= kMostReports) return;
    char place[96] = "";
    const uintptr_t at = reinterpret_cast<uintptr_t>(address);
    if (at >= shared_begin() && at < shared_end()) std::snprintf(place, sizeof place, ", shared memory + %zu", static_cast<size_t>(at - shared_begin()));
    for (size_t b = 0; b < buffers.size(); ++b) {
        const auto near = static_cast<int64_t>(at - buffers[b].begin), size = static_cast<int64_t>(buffers[b].end - buffers[b].begin);
        if (near > -256 && near < size + 256) std::snprintf(place, sizeof place, ", buffer %zu of %lld bytes + %lld", b, static_cast<long long>(size), static_cast<long long>(near));
    }
    char line[256];
    std::snprintf(line, sizeof line, "block (%u, %u, %u) thread %u: %s, %zu bytes%s", blockIdx.x, blockIdx.y, blockIdx.z, me - 1, what, bytes, place);
    found.emplace_back(line);
}

}  // namespace fastkd_machine::watch

// What gcc's -fsanitize=thread calls.
#define ACCESS(name, bytes, write) \
    extern "C" void __tsan_##name(void* address) { fastkd_machine::watch::access(reinterpret_cast<uintptr_t>(address), bytes, write); }
ACCESS(read1, 1, false)
ACCESS(read2, 2, false)
ACCESS(read4, 4, false)
ACCESS(read8, 8, false)
ACCESS(read16, 16, false)
ACCESS(write1, 1, true)
ACCESS(write2, 2, true)
ACCESS(write4, 4, true)
ACCESS(write8, 8, true)
ACCESS(write16, 16, true)
ACCESS(unaligned_read2, 2, false)
ACCESS(unaligned_read4, 4, false)
ACCESS(unaligned_read8, 8, false)
ACCESS(unaligned_read16, 16, false)
ACCESS(unaligned_write2, 2, true)
ACCESS(unaligned_write4, 4, true)
ACCESS(unaligned_write8, 8, true)
ACCESS(unaligned_write16, 16, true)
extern "C" void __tsan_read_range(void* address, size_t bytes) { fastkd_machine::watch::access(reinterpret_cast<uintptr_t>(address), bytes, false); }
extern "C" void __tsan_write_range(void* address, size_t bytes) { fastkd_machine::watch::access(reinterpret_cast<uintptr_t>(address), bytes, true); }
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
