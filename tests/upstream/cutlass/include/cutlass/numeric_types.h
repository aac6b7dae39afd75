// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cutlass/bfloat16.h"
#include "cutlass/float8.h"
#include "cutlass/half.h"
#include "cutlass/integer_subbyte.h"
