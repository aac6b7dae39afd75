// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace cutlass
{
// Only a name and a width: packed weights are read a 32-bit word at a time.
template <int Bits, bool Signed>
struct integer_subbyte
{
    static_assert(Bits < 8, "whole bytes have types of their own");
    uint8_t storage;
};

using uint4b_t = integer_subbyte<4, false>;

template <class T>
struct sizeof_bits
{
    static constexpr int value = int(sizeof(T)) * 8;
};

template <int Bits, bool Signed>
struct sizeof_bits<integer_subbyte<Bits, Signed>>
{
    static constexpr int value = Bits;
};
} // namespace cutlass
