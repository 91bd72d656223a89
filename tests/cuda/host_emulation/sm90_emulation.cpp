// Hopper's copy engine, barriers, registers and clusters: sm90_emulation.h.
#include "sm90_emulation.h"

#include <array>
#include <map>

#include "shared_memory.hpp"
#include "state.hpp"

struct TensorMap {
    std::array<unsigned long long, 16> words;  // as runner.py's `tensor_map` describes a tensor
};

namespace emulation {

// ---- Addresses -------------------------------------------------------------------------------------------------------

constexpr unsigned STATIC_START = 1024, ALIGNMENT = 1024, OF_TEMPLATES = 1u << 20;
// Static variables of function templates, which g++ puts into no section: all within so many bytes from the first one's address.
constexpr unsigned TEMPLATES_BYTES = 8192;
static const char *of_templates;

unsigned dynamic_start() {
    const unsigned static_bytes = (unsigned)(launched.static_end - launched.static_start);
    return (STATIC_START + static_bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

char *at_shared(unsigned address, unsigned nbytes) {
    const Block &block = blocks[block_of(address)];
    const unsigned at = address % OF_BLOCK, dynamic = dynamic_start();
    if (at % nbytes) fail("an access of " + std::to_string(nbytes) + " bytes of shared memory at an address not aligned to it");
    if (block.live == 0) fail("an access to the shared memory of a block that has ended");
    if (at >= dynamic && at + nbytes <= dynamic + launched.shared_bytes) return block.shared + (at - dynamic);
    if (at >= OF_TEMPLATES && at + nbytes <= OF_TEMPLATES + TEMPLATES_BYTES) return const_cast<char *>(of_templates) + (at - OF_TEMPLATES);
    if (at < STATIC_START || at + nbytes > STATIC_START + (launched.static_end - launched.static_start))
        fail("an access to shared memory that there is not, " + std::to_string((int)(at - dynamic)) + " from the dynamic's start");
    return launched.static_start + (at - STATIC_START);
}

// ---- mbarriers -----------------------------------------------------------------------------------------------------

struct MemoryBarrier {
    int arrivals = 0, missing = 0, waiters = 0;
    long long nbytes = 0;  // that copies have not yet brought
    unsigned phases = 0;   // that are complete
    std::vector<std::function<long long()>> copies;  // that are under way; each returns its bytes

    void arrive(int count) {
        missing -= count;
        if (missing < 0) fail("more arrivals at a memory barrier than it takes");
        complete();
    }
    void complete() {
        if (missing > 0 || nbytes > 0) return;
        if (nbytes < 0) fail("copies bring more bytes than a memory barrier expects");
        ++phases;
        missing = arrivals;
    }
    void land() {
        for (const auto &copy : std::exchange(copies, {})) {
            nbytes -= copy();
            complete();
        }
    }
    template <class Copies> void begin(Copies copy) {
        copies.push_back(copy);
        if (launched.descending || waiters > 0) land();
    }
};

static std::vector<std::map<unsigned, MemoryBarrier>> memory_barriers;  // of each block

static MemoryBarrier &memory_barrier(unsigned address) {
    at_shared(address, 8);
    auto &of_block = memory_barriers[block_of(address)];
    const auto found = of_block.find(address % OF_BLOCK);
    if (found == of_block.end()) fail("a memory barrier that was not set up");
    return found->second;
}

// ---- Tensor copies ---------------------------------------------------------------------------------------------------

// A box of a tensor, as runner.py's `tensor_map` describes it.
struct Box {
    TensorMap tensor;
    std::array<int, 4> at;

    // Between the tensor and shared memory, 16 bytes at a time. What lies outside of the tensor is zero, and is not written.
    long long copy(unsigned to, bool out) const {
        const auto &map = tensor.words;
        const int rank = (int)(map[1] & 255), swizzle = (int)(map[1] >> 8);  // bytes that it spans
        const auto dimension = [&](int d) { return map.data() + 2 + 3 * d; };  // extent; stride in bytes; elements in shared memory and their step
        if (to % 128) fail("a tensor copy to an address of shared memory that is not a multiple of 128");
        const long long run = (unsigned)dimension(0)[2];
        long long rows = 1;
        for (int d = 1; d < rank; ++d) rows *= (unsigned)dimension(d)[2];
        for (long long row = 0; row < rows; ++row) {
            long long rest = row, offset = 0;
            bool inside = true;
            for (int d = 1; d < rank; ++d) {
                const long long extent = dimension(d)[0], stride = dimension(d)[1], count = (unsigned)dimension(d)[2], step = dimension(d)[2] >> 32;
                const long long position = at[d] + rest % count * step;
                rest /= count;
                inside = inside && position >= 0 && position < extent;
                offset += position * stride;
            }
            for (long long first = 0; first < run; first += 8) {
                const unsigned plain = to + (unsigned)(row * run + first) * 2;
                const unsigned mask = swizzle == 128 ? 7 : swizzle == 64 ? 3 : 0;
                char *const shared = at_shared(plain ^ (plain >> 7 & mask) << 4, 16);
                const long long begin = at[0] + first, extent = inside ? (long long)dimension(0)[0] : 0;
                const long long from = std::clamp(-begin, 0ll, 8ll), end = std::clamp(extent - begin, from, 8ll);
                char *const memory = reinterpret_cast<char *>(map[0]) + offset + 2 * begin;
                if (out) {
                    if (end > from) memcpy(memory + 2 * from, shared + 2 * from, 2 * (end - from));
                    continue;
                }
                memset(shared, 0, 16);
                if (end > from) memcpy(shared + 2 * from, memory + 2 * from, 2 * (end - from));
            }
        }
        return 2 * run * rows;
    }
};

static void load_box(unsigned to, const TensorMap &map, unsigned barrier, std::array<int, 4> first) {
    const unsigned in_cluster = to % OF_BLOCK + (unsigned)(block_of(to) + 1) * OF_BLOCK;  // whoever makes the copy
    memory_barrier(barrier).begin([in_cluster, box = Box{map, first}] { return box.copy(in_cluster, false); });
}

// ---- Of threads: groups of stores; of blocks: barriers by number, registers that no thread has ----------------------------

static std::vector<std::deque<std::function<void()>>> stores;  // of each fiber
struct NumberedBarrier {
    Barrier barrier;
    int threads = 0;
};
static std::vector<std::array<NumberedBarrier, 16>> numbered;
static std::vector<unsigned> spare_registers;
static std::vector<unsigned> registers;  // of each fiber
static Barrier cluster_barrier;

static void store(std::function<void()> copy) {
    if (launched.descending) std::exchange(copy, [] {})();
    stores[number_of(self)].push_back(std::move(copy));
}

static NumberedBarrier &come(int id, int threads) {
    if (id < 0 || id > 15 || threads % 32) fail("no such named barrier");
    NumberedBarrier &barrier = numbered[self->block][id];
    if (barrier.barrier.arrived > 0 && barrier.threads != threads) fail("a named barrier of different numbers of threads");
    barrier.threads = threads;
    return barrier;
}

static void begin_sm90() {
    of_templates = nullptr;
    memory_barriers.assign(blocks.size(), {});
    stores.assign(fibers.size(), {});
    numbered.assign(blocks.size(), {});
    cluster_barrier = {};
    spare_registers.assign(blocks.size(), 0);
    registers.assign(fibers.size(), (unsigned)(65536 / (fibers.size() / blocks.size()) / 8 * 8));
}

static std::string end_sm90() {
    for (const auto &of_block : memory_barriers)
        for (const auto &[address, barrier] : of_block)
            if (!barrier.copies.empty()) return "a block ends while copies to it are under way";
    for (const auto &of_thread : stores)
        if (!of_thread.empty()) return "a thread ends while what it stores may not have been read";
    return "";
}

static std::string awaited_barriers() {
    std::string all;
    for (const auto &of_block : memory_barriers)
        for (const auto &[address, barrier] : of_block)
            if (barrier.waiters)
                all += " the one " + std::to_string((int)(address - dynamic_start())) + " bytes from the dynamic shared memory's start lacks " +
                       std::to_string(barrier.missing) + " arrivals, " + std::to_string(barrier.nbytes) + " bytes;";
    return all;
}

static const bool is_hooked = add_hooks({begin_sm90, end_sm90, awaited_barriers});

// Of lanes 8i .. 8i+7 the addresses of the i-th matrix' rows: use(i, e, element) is called for the lane's own elements.
template <class Use> void transposed_elements(unsigned at, int matrices, Use use) {
    static unsigned rows[32][32];
    unsigned(&own_rows)[32] = rows[current / 32];
    const int lane = current % 32;
    own_rows[lane] = at;
    wait_warp(~0u);
    for (int i = 0; i < matrices; ++i)
        for (int e = 0; e < 2; ++e)
            use(i, e, reinterpret_cast<unsigned short *>(at_shared(own_rows[8 * i + lane % 4 * 2 + e], 16)) + lane / 4);
    wait_warp(~0u);
}

template <int Count> void store_matrices(unsigned at, const unsigned (&m)[Count]) {
    transposed_elements(at, Count, [&](int i, int e, unsigned short *element) { *element = (unsigned short)(m[i] >> 16 * e); });
}

template <int Count> void load_matrices(unsigned at, unsigned (&m)[Count]) {
    std::fill(m, m + Count, 0);
    transposed_elements(at, Count, [&](int i, int e, const unsigned short *element) { m[i] |= (unsigned)*element << 16 * e; });
}

}  // namespace emulation

unsigned shared_address(const void *p) {
    using namespace emulation;
    const char *at = static_cast<const char *>(p);
    if (at >= launched.static_start && at < launched.static_end) return STATIC_START + (unsigned)(at - launched.static_start);
    if (at >= dynamic_shared && at < dynamic_shared + launched.shared_bytes) return dynamic_start() + (unsigned)(at - dynamic_shared);
    if (!of_templates) of_templates = at;
    return OF_TEMPLATES + (unsigned)(at - of_templates);
}

void barrier_init(unsigned barrier, unsigned arrivals) {
    emulation::at_shared(barrier, 8);
    emulation::MemoryBarrier &own = emulation::memory_barriers[emulation::self->block][barrier];
    own = {};
    own.arrivals = own.missing = (int)arrivals;
}
void barrier_arrive(unsigned barrier, unsigned count) { emulation::memory_barrier(barrier).arrive((int)count); }
void barrier_expect(unsigned barrier, unsigned nbytes) {
    emulation::MemoryBarrier &own = emulation::memory_barrier(barrier);
    own.nbytes += nbytes;
    own.arrive(1);
}
void barrier_wait(unsigned barrier, unsigned parity) {
    emulation::MemoryBarrier &awaited = emulation::memory_barrier(barrier);
    if (awaited.phases % 2 == parity) awaited.land();
    if (awaited.phases % 2 != parity) return;
    ++awaited.waiters;
    emulation::await_change(awaited.phases, awaited.phases, "a memory barrier");
    --awaited.waiters;
}
unsigned barrier_test(unsigned barrier, unsigned parity) { return emulation::memory_barrier(barrier).phases % 2 != parity; }
void named_barrier(int id, int threads) { emulation::wait(emulation::come(id, threads).barrier, threads, "a named barrier"); }
void named_barrier_arrive(int id, int threads) {
    emulation::Barrier &barrier = emulation::come(id, threads).barrier;
    if (++barrier.arrived == threads) emulation::open(barrier);
}

namespace emulation {

void give_registers(unsigned count) {
    unsigned &own = registers[number_of(self)];
    if (own < count) fail("a warpgroup gives registers that it has not");
    spare_registers[self->block] += own - count;
    own = count;
}

void take_registers(unsigned count) {
    unsigned &own = registers[number_of(self)], &spare = spare_registers[self->block];
    if (own > count) fail("a warpgroup takes fewer registers than it has");
    while (spare < count - own) await_change(spare, spare, "registers");
    spare -= count - own, own = count;
}

void await_stores(size_t pending) {
    auto &own = stores[number_of(self)];
    if (own.size() > pending && !launched.descending) await_idleness(STORES);
    for (; own.size() > pending; own.pop_front()) own.front()();
}

}  // namespace emulation

void load_chunk(unsigned to, const TensorMap &map, unsigned barrier, int c0, int c1) {
    emulation::load_box(to, map, barrier, {c0, c1, 0, 0});
}
void load_tile(unsigned to, const TensorMap &map, unsigned barrier, int c0, int c1, int c2) {
    emulation::load_box(to, map, barrier, {c0, c1, c2, 0});
}
void load_tile(unsigned to, const TensorMap &map, unsigned barrier, int c0, int c1, int c2, int c3) {
    emulation::load_box(to, map, barrier, {c0, c1, c2, c3});
}
void copy_bytes(unsigned to, unsigned long long from, unsigned nbytes, unsigned barrier) {
    if (from % 16 || nbytes % 16 || nbytes == 0) emulation::fail("a copy of bytes that are no multiple of 16");
    const unsigned in_cluster = to + (unsigned)(emulation::self->block + 1) * emulation::OF_BLOCK;
    emulation::memory_barrier(barrier).begin([=] {
        for (unsigned i = 0; i < nbytes; i += 16) memcpy(emulation::at_shared(in_cluster + i, 16), reinterpret_cast<const char *>(from) + i, 16);
        return (long long)nbytes;
    });
}
void store_tile(const TensorMap &map, unsigned from, int c0, int c1, int c2, int c3) {
    emulation::store([from, box = emulation::Box{map, {c0, c1, c2, c3}}] { box.copy(from, true); });
}
void store_nothing() { emulation::store([] {}); }

unsigned load_shared4(unsigned at) { return emulation::read_shared<unsigned>(at); }
uint4 load_shared16(unsigned at) { return emulation::read_shared<uint4>(at); }
void store_shared16(unsigned at, float4 v) { emulation::write_shared(at, v); }
void store_shared8(unsigned at, float x, float y) { emulation::write_shared(at, float2{x, y}); }
void store_shared4(unsigned at, unsigned v) { emulation::write_shared(at, v); }
void store_shared2(unsigned at, unsigned short v) { emulation::write_shared(at, v); }
void store_shared_words(unsigned at, unsigned a, unsigned b, unsigned c, unsigned d) { emulation::write_shared(at, uint4{a, b, c, d}); }
void store_shared(unsigned at, const unsigned (&v)[1]) { emulation::write_shared(at, v[0]); }
void store_shared(unsigned at, const unsigned (&v)[2]) { emulation::write_shared(at, uint2{v[0], v[1]}); }
void store_matrices(unsigned at, unsigned m0, unsigned m1) { emulation::store_matrices<2>(at, {m0, m1}); }
void store_matrices(unsigned at, unsigned m0, unsigned m1, unsigned m2, unsigned m3) { emulation::store_matrices<4>(at, {m0, m1, m2, m3}); }
void load_matrices(unsigned at, unsigned &m0, unsigned &m1) {
    unsigned m[2];
    emulation::load_matrices(at, m);
    m0 = m[0], m1 = m[1];
}
void load_matrices(unsigned at, unsigned &m0, unsigned &m1, unsigned &m2, unsigned &m3) {
    unsigned m[4];
    emulation::load_matrices(at, m);
    m0 = m[0], m1 = m[1], m2 = m[2], m3 = m[3];
}

void copy_chunk(unsigned to, const unsigned short *source, bool is_live) {
    emulation::copy_async(emulation::at_shared(to, 16), is_live ? source : nullptr, 16);
}

// ---- Clusters ----------------------------------------------------------------------------------------------------------

unsigned address_at(int block, unsigned at) {
    if (block < 0 || block >= (int)emulation::blocks.size()) emulation::fail("the cluster has no such block");
    return at + (unsigned)(block + 1) * emulation::OF_BLOCK;
}
void barrier_arrive_at(int block, unsigned barrier) { barrier_arrive(address_at(block, barrier)); }
void load_tile_to(unsigned short blocks, unsigned to, const TensorMap &map, unsigned barrier, int c0, int c1, int c2, int c3) {
    for (int block = 0; block < 16; ++block)
        if (blocks >> block & 1) load_tile(address_at(block, to), map, address_at(block, barrier), c0, c1, c2, c3);
}
void push16(unsigned there, float4 v, unsigned barrier) {
    emulation::memory_barrier(barrier).begin([=] {
        emulation::write_shared(there, v);
        return 16ll;
    });
}
void cluster_meet() {
    emulation::wait(emulation::cluster_barrier, (int)emulation::fibers.size(), "its cluster");
}
