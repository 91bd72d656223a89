// The host's emulation of a grid of threads: cuda_emulation.h.
#include <cstdio>
#include <map>
#include <memory>

#include "state.hpp"

dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace emulation {

constexpr size_t STACK_BYTES = 128 << 10, SHARED_ALIGNMENT = 1024, SHARED_GUARD = 256;
constexpr size_t MOST_SHARED_BYTES = 232448;  // of a block of sm_90

std::vector<Fiber> fibers;
std::vector<Block> blocks;
Fiber *self;
Block *own;
Grid launched;
int current;
char *dynamic_shared;
static std::vector<std::unique_ptr<char[]>> stacks;
static jmp_buf scheduler;
static std::string fault;
static std::function<void()> body;

// Other sources' own begin before this one's variables may be there.
static std::vector<Hooks> &hooks() {
    static std::vector<Hooks> all;
    return all;
}
bool add_hooks(Hooks added) {
    hooks().push_back(added);
    return true;
}

[[noreturn]] void fail(const std::string &what) {
    char where[160];
    snprintf(where, sizeof where, " (block %u,%u,%u thread %u,%u,%u)", blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x,
             threadIdx.y, threadIdx.z);
    fault = what + where;
    _longjmp(scheduler, 2);
}

static void yield() {
    if (_setjmp(self->at) == 0) _longjmp(scheduler, 1);
}

void await_change(const unsigned &word, unsigned seen, const char *what) {
    self->watched = &word, self->seen = seen, self->awaited = what;
    while (word == seen) yield();
    self->watched = nullptr;
}

static unsigned idle_times[2];
static int idlers[2];

void await_idleness(Late what) {
    ++idlers[what];
    await_change(idle_times[what], idle_times[what], "the others");
    --idlers[what];
}

void open(Barrier &barrier) {
    barrier.arrived = 0;
    ++barrier.generation;
}

// The last one does not go ahead of its warp: lanes are together behind a barrier.
void wait(Barrier &barrier, int expected, const char *what, const std::function<void()> &last) {
    const unsigned generation = barrier.generation;
    if (++barrier.arrived >= expected) {
        if (last) last();
        open(barrier);
        yield();
    } else {
        await_change(barrier.generation, generation, what);
    }
}

void wait_block() { wait(own->barrier, own->live, "__syncthreads"); }

bool any_of_block(bool is) {
    own->any = own->any || is;
    wait_block();
    const bool any = own->any;
    wait_block();
    own->any = false;
    wait_block();
    return any;
}

void wait_warp(unsigned mask) {
    int present = std::min<int>(32, (int)(blockDim.x * blockDim.y * blockDim.z) - current / 32 * 32);
    wait(own_warp().barrier, __builtin_popcount(present == 32 ? mask : mask & ((1u << present) - 1)), "its warp");
}

static void enter() {
    body();
    self->finished = true;
    if (--own->live > 0 && own->barrier.arrived >= own->live) open(own->barrier);  // a thread that has left counts as arrived
    _longjmp(scheduler, 1);
}

void exchange(unsigned mask, void *value, size_t nbytes, int source_lane) {
    Warp &warp = own_warp();
    int lane = current % 32;
    memcpy(warp.values[lane], value, nbytes);
    wait_warp(mask);
    memcpy(value, warp.values[source_lane < 0 || source_lane > 31 ? lane : source_lane], nbytes);
    wait_warp(mask);
}

// ---- cp.async ----------------------------------------------------------------------------------------------------------

void copy_async(void *target, const void *source, size_t nbytes) {
    check_aligned(target, nbytes);
    if (source) check_aligned(source, nbytes);
    self->open.push_back({target, source, nbytes});
}

void commit_copies() { self->pending.push_back(std::exchange(self->open, {})); }

void await_copies(size_t pending) {
    for (; self->pending.size() > pending; self->pending.pop_front())
        for (const Copy &copy : self->pending.front()) {
            if (copy.source)
                memcpy(copy.target, copy.source, copy.nbytes);
            else
                memset(copy.target, 0, copy.nbytes);
        }
}

// ---- Running -----------------------------------------------------------------------------------------------------------

// noinline: its locals must not be kept in registers across setjmp in the caller's loop.
__attribute__((noinline)) static bool resume(Fiber &fiber) {
    self = &fiber;
    own = &blocks[fiber.block];
    current = fiber.thread;
    threadIdx = fiber.index;
    blockIdx = own->index;
    dynamic_shared = own->shared;
    int why = _setjmp(scheduler);
    if (why == 0) {
        if (fiber.started) _longjmp(fiber.at, 1);
        fiber.started = true;
        setcontext(&fiber.start);
    }
    return why != 2;
}

// What the threads wait for that are left.
static void name_deadlock() {
    std::map<std::string, int> waiting;
    for (const Fiber &fiber : fibers)
        if (!fiber.finished) ++waiting[fiber.awaited];
    fault = "a barrier that some threads never reach:";
    for (const auto &[what, count] : waiting) fault += " " + std::to_string(count) + " threads wait for " + what + ";";
    for (const Hooks &hook : hooks()) fault += hook.deadlock();
    const dim3 &index = blocks[0].index;
    fault += " block " + std::to_string(index.x) + "," + std::to_string(index.y) + "," + std::to_string(index.z);
}

static bool run_cluster() {
    const size_t threads = fibers.size() / blocks.size();
    for (Block &block : blocks) {
        std::fill(block.memory.begin(), block.memory.end(), (char)0xFF);
        block.barrier = Barrier();
        block.warps.assign((threads + 31) / 32, Warp());
        block.live = (int)threads;
        block.any = false;
    }
    for (Fiber &fiber : fibers) {
        fiber.started = fiber.finished = false;
        fiber.watched = nullptr;
        fiber.open.clear();
        fiber.pending.clear();
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = stacks[number_of(&fiber)].get();
        fiber.start.uc_stack.ss_size = STACK_BYTES;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, enter, 0);
    }
    std::fill(launched.static_start, launched.static_end, (char)0xFF);
    for (const Hooks &hook : hooks()) hook.begin();
    idlers[PRODUCTS] = idlers[STORES] = 0;
    for (size_t left = fibers.size(); left > 0;) {
        bool progress = false;
        for (size_t i = 0; i < fibers.size(); ++i) {
            Fiber &fiber = fibers[launched.descending ? fibers.size() - 1 - i : i];
            if (fiber.finished || (fiber.watched && *fiber.watched == fiber.seen)) continue;
            if (!resume(fiber)) return false;
            left -= fiber.finished;
            progress = true;
        }
        if (progress) continue;
        if (!idlers[PRODUCTS] && !idlers[STORES]) {
            name_deadlock();
            return false;
        }
        ++idle_times[idlers[PRODUCTS] ? PRODUCTS : STORES];
    }
    for (const Block &block : blocks)
        for (const char *p = block.shared + launched.shared_bytes; p < block.memory.data() + block.memory.size(); ++p)
            if (*p != (char)0xFF) {
                fault = "written behind the dynamic shared memory";
                return false;
            }
    for (const Hooks &hook : hooks())
        if (!(fault = hook.end()).empty()) return false;
    return true;
}

const char *run(const std::function<void()> &thread, const Grid &grid) {
    const size_t static_bytes = grid.static_end - grid.static_start;
    const auto [cluster, threads] = std::pair(grid.cluster, (int)(grid.threads.x * grid.threads.y * grid.threads.z));
    if (grid.blocks.x % cluster || (cluster > 1 && static_bytes) || grid.shared_bytes + static_bytes > MOST_SHARED_BYTES)
        return "no such cluster, or one with static shared memory, which blocks have in common here, or more shared memory than there is";
    launched = grid, body = thread, gridDim = grid.blocks, blockDim = grid.threads;
    fibers.resize(threads * cluster);
    for (int i = 0; i < (int)fibers.size(); ++i) {
        const unsigned number = i % threads;
        if (i == (int)stacks.size()) stacks.emplace_back(new char[STACK_BYTES]);
        fibers[i].block = i / threads, fibers[i].thread = number;
        fibers[i].index = {number % blockDim.x, number / blockDim.x % blockDim.y, number / blockDim.x / blockDim.y};
    }
    blocks.resize(cluster);
    for (Block &block : blocks) {
        block.memory.resize(SHARED_ALIGNMENT + grid.shared_bytes + SHARED_GUARD);
        block.shared = (char *)(((uintptr_t)block.memory.data() + SHARED_ALIGNMENT - 1) / SHARED_ALIGNMENT * SHARED_ALIGNMENT);
    }
    for (unsigned z = 0; z < gridDim.z; ++z)
        for (unsigned y = 0; y < gridDim.y; ++y)
            for (unsigned x = 0; x < gridDim.x; x += cluster) {
                for (int i = 0; i < cluster; ++i) blocks[i].index = {x + i, y, z};
                if (!run_cluster()) return fault.c_str();
            }
    return nullptr;
}

}  // namespace emulation
