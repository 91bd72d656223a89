// The emulation's own state, for its sources: fibers, the blocks of the cluster that runs, barriers.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <deque>
#include <utility>
#include <vector>

#include "cuda_emulation.h"

namespace emulation {

struct Barrier {
    int arrived = 0;
    unsigned generation = 0;
};

struct Copy {
    void *target;
    const void *source;  // null: zeros
    size_t nbytes;
};

struct Fiber {
    dim3 index;
    int block, thread;  // of the cluster, of the block
    ucontext_t start;
    jmp_buf at;
    bool started = false, finished = false;
    const unsigned *watched = nullptr;  // it goes on when this is another number than `seen`
    unsigned seen;
    const char *awaited;
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> pending;
};

struct Warp {
    Barrier barrier;
    unsigned char values[32][8];
};

struct Block {
    dim3 index;
    int live;
    Barrier barrier;
    std::vector<Warp> warps;
    std::vector<char> memory;
    char *shared;  // dynamic
    bool any = false;  // of what its threads came with to `any_of_block`
};

extern std::vector<Fiber> fibers;  // of all blocks of the cluster
extern std::vector<Block> blocks;
extern Fiber *self;
extern Block *own;  // block
extern Grid launched;

// What other sources do before and after each cluster, which says what is wrong then, and what they say of a deadlock.
struct Hooks {
    void (*begin)();
    std::string (*end)();
    std::string (*deadlock)();
};
bool add_hooks(Hooks hooks);

// Wait while `word` is `seen`.
void await_change(const unsigned &word, unsigned seen, const char *what);
// Wait until nothing else can go on: but products, where `Late` is STORES.
enum Late { PRODUCTS, STORES };
void await_idleness(Late what);
void open(Barrier &barrier);
// `last`: what the last one does before all go on.
void wait(Barrier &barrier, int expected, const char *what, const std::function<void()> &last = {});

inline size_t number_of(const Fiber *fiber) { return fiber - fibers.data(); }
inline Warp &own_warp() { return own->warps[current / 32]; }

}  // namespace emulation
