// SPDX-License-Identifier: Apache-2.0
// Numbers as types: a tile shape is spelled out in a kernel's type, hence in its mangled name.
#pragma once

namespace cute
{
template <auto v>
struct C
{
    static constexpr auto value = v;
    using value_type = decltype(v);
    constexpr operator value_type() const
    {
        return v;
    }
};

template <int v>
using Int = C<v>;

using _1 = Int<1>;
using _2 = Int<2>;
} // namespace cute
