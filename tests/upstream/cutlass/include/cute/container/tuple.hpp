// SPDX-License-Identifier: Apache-2.0
// A tuple of types; nothing here needs its values at run time.
#pragma once

#include "cute/numeric/integral_constant.hpp"

#include <tuple>

namespace cute
{
template <class... T>
struct tuple
{
};

template <class... T>
using Shape = tuple<T...>;

template <class... T>
using Stride = tuple<T...>;

template <int I, class... T>
constexpr auto get(tuple<T...> const&)
{
    return std::tuple_element_t<I, std::tuple<T...>>{};
}

// One extent of a static shape.
template <int I, class... T>
constexpr int size(tuple<T...> const&)
{
    return std::tuple_element_t<I, std::tuple<T...>>::value;
}
} // namespace cute
