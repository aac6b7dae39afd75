// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cute/container/tuple.hpp"
#include "cute/numeric/integral_constant.hpp"
