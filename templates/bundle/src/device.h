// Rendered from templates/bundle/src/device.h; do not edit.

// The current device: whether kernels of this library run on it, and how many SMs it has.

#pragma once

#include "w4a16.h"

namespace w4a16 {

// Cheap after the first call on a device: it is made before every launch.
w4a16_status check_current_device(int &sm_count);

// Makes the device's context current on a thread that has none, as every launch through the runtime would.  CUTLASS
// encodes tensor maps through the driver first, which fails without a context, and launches all the same.
w4a16_status ensure_context();

// What the choice of a tactic assumes where it cannot ask: 132 SMs, as H100 and H200 (SXM) have.
int sm_count_or_default();

} // namespace w4a16
