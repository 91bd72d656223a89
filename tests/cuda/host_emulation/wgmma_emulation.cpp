// Products of warpgroups: wgmma_emulation.h.
#include "wgmma_emulation.h"

#include "shared_memory.h"

namespace emulation {

static std::vector<std::vector<Product>> open_products;                // of each fiber
static std::vector<std::deque<std::vector<Product>>> product_groups;  // committed

// The operand's rows first .. first + count - 1 of 16 terms each, of M or N (PTX ISA, "Shared Memory Matrix Layout"): put(row, term, bits).
template <class Put> static void read_operand(unsigned long long descriptor, bool transposed, int first, int count, Put put) {
    const unsigned start = (unsigned)(descriptor & 0x3fff) << 4, leading = (unsigned)(descriptor >> 16 & 0x3fff) << 4;
    const unsigned stride = (unsigned)(descriptor >> 32 & 0x3fff) << 4, swizzle = (unsigned)(descriptor >> 62);
    if (descriptor >> 49 & 7) fail("a base offset of a descriptor");
    const unsigned span = swizzle == 0 ? 16 : swizzle == 1 ? 128 : swizzle == 2 ? 64 : 32;  // bytes of a row
    const auto eight = [&](unsigned at, auto use) {  // from an address before it is swizzled
        const unsigned short *v = reinterpret_cast<const unsigned short *>(at_shared(at ^ (at >> 7 & (span / 16 - 1)) << 4, 16));
        for (int e = 0; e < 8; ++e) use(e, v[e]);
    };
    if (transposed) {  // [term][row], eights of terms `stride` apart, spans of rows `leading`; without a swizzle the other way round
        for (int term = 0; term < 16; ++term)
            for (int row = first; row < first + count; row += 8) {
                const unsigned spans = row * 2 / span, eights = term / 8;
                const unsigned at = start + (swizzle ? spans * leading + eights * stride : spans * stride + eights * leading) + term % 8 * span + row * 2 % span;
                eight(at, [&](int e, unsigned short bits) { put(row + e, term, bits); });
            }
        return;
    }
    for (int row = first; row < first + count; ++row)  // [row][term], eights of rows `stride` apart, without a swizzle those of terms `leading`
        for (int half = 0; half < 2; ++half)
            eight(start + row / 8 * stride + row % 8 * span + half * (swizzle ? 16 : leading), [&](int e, unsigned short bits) { put(row, 8 * half + e, bits); });
}

// All groups of the warp's but the last `pending`, by the last of its threads that came to wait.
static void make_products(int pending) {
    typedef float Eight __attribute__((vector_size(32), aligned(32)));
    static float left[16][16];
    static Eight b[16][32], sums[16][32];
    const size_t warp = number_of(self) / 32 * 32;
    const auto value = [](unsigned short bits) { return __uint_as_float((unsigned)bits << 16); };
    const auto sum = [&](int lane, int i) -> float & {  // the lane's i-th
        return reinterpret_cast<float *>(sums[lane / 4 + i / 2 % 2 * 8])[i / 4 * 8 + lane % 4 * 2 + i % 2];
    };
    const auto &groups = product_groups[warp];
    for (int lane = 1; lane < 32; ++lane)
        if (product_groups[warp + lane].size() != groups.size()) fail("threads of a warp have different numbers of groups of products");
    while ((int)groups.size() > pending) {
        const size_t count = groups.front().size();
        for (size_t i = 0; i < count; ++i) {
            const Product &product = groups.front()[i];
            for (int lane = 1; lane < 32; ++lane) {
                const auto &others = product_groups[warp + lane].front();
                if (others.size() != count || others[i].a != product.a || others[i].b != product.b || others[i].columns != product.columns || others[i].add != product.add)
                    fail("threads of a warp make different products");
            }
            const int columns = product.columns, first_row = current / 32 % 4 * 16;
            if (product.in_registers) {
                for (int lane = 0; lane < 32; ++lane)
                    for (int word = 0; word < 4; ++word)
                        for (int e = 0; e < 2; ++e)
                            left[lane / 4 + word % 2 * 8][lane % 4 * 2 + word / 2 * 8 + e] = value((unsigned short)(product_groups[warp + lane].front()[i].words[word] >> 16 * e));
            } else {
                read_operand(product.a, product.a_transposed, first_row, 16, [&](int row, int term, unsigned short bits) { left[row - first_row][term] = value(bits); });
            }
            read_operand(product.b, product.b_transposed, 0, columns, [&](int row, int term, unsigned short bits) { reinterpret_cast<float *>(b[term])[row] = value(bits); });
            const bool goes_on = i > 0 && groups.front()[i - 1].sums == product.sums;
            if (!goes_on)
                for (int lane = 0; lane < 32; ++lane)
                    for (int j = 0; j < columns / 2; ++j) sum(lane, j) = product_groups[warp + lane].front()[i].sums[j];
            for (int eight = 0; eight < columns / 8; ++eight)
                for (int row = 0; row < 16; ++row) {
                    Eight of_row = product.add ? sums[row][eight] : Eight{};
                    for (int term = 0; term < 16; ++term) of_row += left[row][term] * b[term][eight];
                    sums[row][eight] = of_row;
                }
            if (i + 1 == count || groups.front()[i + 1].sums != product.sums)
                for (int lane = 0; lane < 32; ++lane)
                    for (int j = 0; j < columns / 2; ++j) product_groups[warp + lane].front()[i].sums[j] = sum(lane, j);
        }
        for (int lane = 0; lane < 32; ++lane) product_groups[warp + lane].pop_front();
    }
}

static void begin_wgmma() {
    open_products.assign(fibers.size(), {});
    product_groups.assign(fibers.size(), {});
}

static std::string end_wgmma() {
    for (size_t i = 0; i < fibers.size(); ++i)
        if (!open_products[i].empty() || !product_groups[i].empty()) return "a thread ends while products of its warp are under way";
    return "";
}

static const bool is_hooked = add_hooks({begin_wgmma, end_wgmma, [] { return std::string(); }});

void multiply(const Product &product) { open_products[number_of(self)].push_back(product); }

void await_products(int pending) {
    wait(own_warp().barrier, 32, "its warp's products", [=] { make_products(pending); });
}

}  // namespace emulation

void wgmma_commit() {
    using namespace emulation;
    product_groups[number_of(self)].push_back(std::exchange(open_products[number_of(self)], {}));
}
