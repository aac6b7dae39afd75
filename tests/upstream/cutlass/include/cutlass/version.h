// SPDX-License-Identifier: Apache-2.0
#pragma once

#define CUTLASS_MAJOR 4
#define CUTLASS_MINOR 0
#define CUTLASS_PATCH 0
