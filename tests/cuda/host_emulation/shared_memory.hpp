// Shared memory by 32-bit addresses, for the emulation's sources: sm90_emulation.h says which.
#pragma once

#include "state.hpp"

namespace emulation {

constexpr unsigned OF_BLOCK = 1u << 24;

unsigned dynamic_start();
inline int block_of(unsigned address) { return address >= OF_BLOCK ? (int)(address / OF_BLOCK) - 1 : self->block; }

// `nbytes` at an address, which is a multiple of them.
char *at_shared(unsigned address, unsigned nbytes);

template <class T> T read_shared(unsigned address) {
    T value;
    memcpy(&value, at_shared(address, sizeof(T)), sizeof(T));
    return value;
}
template <class T> void write_shared(unsigned address, const T &value) { memcpy(at_shared(address, sizeof(T)), &value, sizeof(T)); }

}  // namespace emulation
