// Products of warpgroups: wgmma_emulation.h.
#include "wgmma_emulation.h"

#include "shared_memory.hpp"

namespace emulation {

// Of each fiber: products since the last group, groups, how many products there were.
static std::vector<std::vector<Product>> open_products;
static std::vector<std::deque<std::vector<Product>>> product_groups;
static std::vector<unsigned> product_counts;

// The operand's rows first .. first + count - 1 of 16 terms each, of M or N: put(row, term, bits). PTX ISA, "Shared Memory Matrix
// Layout": eights of rows that lie one after the other are `stride` apart; of a transposed operand, [term][row], eights of terms are,
// and what its rows hold `leading`. Without swizzle these are 8x8 matrices, the other direction's `leading` apart.
template <class Put> static void read_operand(unsigned long long descriptor, bool transposed, int first, int count, Put put) {
    const unsigned start = (unsigned)(descriptor & 0x3fff) << 4, leading = (unsigned)(descriptor >> 16 & 0x3fff) << 4;
    const unsigned stride = (unsigned)(descriptor >> 32 & 0x3fff) << 4, swizzle = (unsigned)(descriptor >> 62);
    if (descriptor >> 49 & 7) fail("a base offset in a descriptor, which the emulation does not know");
    const unsigned span = swizzle == 0 ? 16 : swizzle == 1 ? 128 : swizzle == 2 ? 64 : 32;  // bytes of a row
    const auto eight = [&](unsigned at, auto use) {                                         // from an address before it is swizzled
        const char *const from = at_shared(at ^ (at >> 7 & (span / 16 - 1)) << 4, 16);
        for (int e = 0; e < 8; ++e) {
            unsigned short bits;
            memcpy(&bits, from + 2 * e, 2);
            use(e, bits);
        }
    };
    if (transposed) {
        for (int term = 0; term < 16; ++term)
            for (int row = first; row < first + count; row += 8) {
                const unsigned of_row = row * 2 / span, of_term = term / 8, within = term % 8 * span + row * 2 % span;
                const unsigned offset = swizzle ? of_row * leading + of_term * stride : of_row * stride + of_term * leading;
                eight(start + offset + within, [&](int e, unsigned short bits) { put(row + e, term, bits); });
            }
        return;
    }
    for (int row = first; row < first + count; ++row)
        for (int half = 0; half < 2; ++half) {
            const unsigned offset = row / 8 * stride + half * (swizzle ? 16 : leading);
            eight(start + offset + row % 8 * span, [&](int e, unsigned short bits) { put(row, 8 * half + e, bits); });
        }
}

typedef float Eight __attribute__((vector_size(32), aligned(32)));  // columns

// A warp's quarter of a product, 16 rows of A by all of B.
struct Quarter {
    float a[16][16];
    Eight b[16][32], sums[16][32];

    // The i-th of the sums that a lane has, as PTX ISA places them.
    float &sum(int lane, int i) { return reinterpret_cast<float *>(sums[lane / 4 + i / 2 % 2 * 8])[i / 4 * 8 + lane % 4 * 2 + i % 2]; }

    // The i-th product of the first group of each of the warp's lanes.
    void read_operands(const std::deque<std::vector<Product>> *lanes, size_t i, int first_row) {
        const Product &product = lanes[0].front()[i];
        const auto value = [](unsigned bits) { return __uint_as_float(bits << 16); };
        if (product.in_registers) {
            for (int lane = 0; lane < 32; ++lane)
                for (int word = 0; word < 4; ++word) {
                    const unsigned pair = lanes[lane].front()[i].words[word];
                    float *const two = &a[lane / 4 + word % 2 * 8][lane % 4 * 2 + word / 2 * 8];
                    two[0] = value(pair), two[1] = value(pair >> 16);
                }
        } else {
            read_operand(product.a, product.a_transposed, first_row, 16,
                         [&](int row, int term, unsigned short bits) { a[row - first_row][term] = value(bits); });
        }
        read_operand(product.b, product.b_transposed, 0, product.columns,
                     [&](int row, int term, unsigned short bits) { reinterpret_cast<float *>(b[term])[row] = value(bits); });
    }

    void multiply(int columns, bool add) {
        for (int eight = 0; eight < columns / 8; ++eight)
            for (int row = 0; row < 16; ++row) {
                Eight sum = add ? sums[row][eight] : Eight{};
                for (int term = 0; term < 16; ++term) sum += a[row][term] * b[term][eight];
                sums[row][eight] = sum;
            }
    }
};

static void demand_alike(const std::deque<std::vector<Product>> *lanes) {
    for (int lane = 1; lane < 32; ++lane) {
        if (lanes[lane].size() != lanes[0].size()) fail("threads of a warp have different numbers of groups of products");
        if (lanes[0].empty()) continue;
        const auto &first = lanes[0].front(), &other = lanes[lane].front();
        const auto same = [](const Product &p, const Product &q) { return p.a == q.a && p.b == q.b && p.columns == q.columns && p.add == q.add; };
        if (!std::equal(first.begin(), first.end(), other.begin(), other.end(), same)) fail("threads of a warp make different products");
    }
}

// All groups of the warp's but the last `pending`, by the last of its threads that came to wait.
static void make_products(int pending) {
    static Quarter quarter;
    auto *const lanes = &product_groups[number_of(self) / 32 * 32];
    for (demand_alike(lanes); (int)lanes[0].size() > pending; demand_alike(lanes)) {
        const auto &products = lanes[0].front();
        for (size_t i = 0; i < products.size(); ++i) {
            const auto has_same_sums = [&](size_t other) { return other < products.size() && products[other].sums == products[i].sums; };
            const auto each_sum = [&](auto use) {
                for (int lane = 0; lane < 32; ++lane)
                    for (int j = 0; j < products[i].columns / 2; ++j) use(lanes[lane].front()[i].sums[j], quarter.sum(lane, j));
            };
            if (!has_same_sums(i - 1)) each_sum([](float &of_thread, float &sum) { sum = of_thread; });
            quarter.read_operands(lanes, i, current / 32 % 4 * 16);
            quarter.multiply(products[i].columns, products[i].add);
            if (!has_same_sums(i + 1)) each_sum([](float &of_thread, float &sum) { of_thread = sum; });
        }
        for (int lane = 0; lane < 32; ++lane) lanes[lane].pop_front();
    }
}

static void begin_wgmma() {
    open_products.assign(fibers.size(), {});
    product_groups.assign(fibers.size(), {});
    product_counts.assign(fibers.size(), 0);
}

static std::string end_wgmma() {
    for (size_t i = 0; i < fibers.size(); ++i)
        if (!open_products[i].empty() || !product_groups[i].empty()) return "a thread ends while products of its warp are under way";
    for (const Fiber &fiber : fibers) {
        const size_t own = number_of(&fiber);
        if (product_counts[own] != product_counts[own - fiber.thread % 128]) return "threads of a warpgroup make different numbers of products";
    }
    return "";
}

static const bool is_hooked = add_hooks({begin_wgmma, end_wgmma, [] { return std::string(); }});

void multiply(const Product &product) {
    open_products[number_of(self)].push_back(product);
    ++product_counts[number_of(self)];
}

void await_products(int pending) {
    const bool is_first_warp = current / 32 % 4 == (launched.descending ? 3 : 0);
    wait(own_warp().barrier, 32, "its warp's products", [=] {
        if (!is_first_warp && (int)product_groups[number_of(self)].size() > pending) await_idleness(PRODUCTS);
        make_products(pending);
    });
}

}  // namespace emulation

void wgmma_commit() {
    using namespace emulation;
    product_groups[number_of(self)].push_back(std::exchange(open_products[number_of(self)], {}));
}
