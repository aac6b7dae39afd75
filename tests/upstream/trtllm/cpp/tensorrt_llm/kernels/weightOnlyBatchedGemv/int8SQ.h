// SPDX-License-Identifier: Apache-2.0
// A decoy beside the GEMV's headers.
#error "int8SQ.h is not part of the W4A16 GEMV"
