// SPDX-License-Identifier: Apache-2.0
// A decoy: nothing includes it, so nothing may vendor it.
#error "cutlass/conv/conv2d.h is not part of any W4A16 kernel"
