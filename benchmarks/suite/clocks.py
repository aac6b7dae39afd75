"""Clocks, power and temperature of a GPU through NVML; where there is none, nothing."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_char_p, c_uint, c_void_p
from typing import Any

_SM, _MEMORY = 1, 2


class Clocks:
    """Reads them in well under a millisecond. ``problem`` is why it cannot, or empty."""

    def __init__(self, uuid: str = "", library: Any = None) -> None:
        self.problem = ""
        self._handle = c_void_p()
        try:
            self._nvml = library or ctypes.CDLL("libnvidia-ml.so.1")
        except OSError as error:
            self.problem = f"clocks are not noted: {error}"
            return
        try:
            status = self._nvml.nvmlInit_v2()
            if status == 0:
                status = self._find(uuid)
            if status != 0:
                self.problem = f"clocks are not noted: NVML error {status}"
        except AttributeError as error:
            self.problem = f"clocks are not noted: {error}"

    def _find(self, uuid: str) -> int:
        if uuid:
            name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
            given = c_char_p(name.encode())
            if self._nvml.nvmlDeviceGetHandleByUUID(given, byref(self._handle)) == 0:
                return 0
        return int(self._nvml.nvmlDeviceGetHandleByIndex_v2(c_uint(0), byref(self._handle)))

    def now(self) -> dict[str, float]:
        """MHz, W and C; what cannot be read is left out."""
        if self.problem:
            return {}
        found: dict[str, float] = {}
        for name, function, which, scale in (
            ("sm_mhz", "nvmlDeviceGetClockInfo", _SM, 1.0),
            ("memory_mhz", "nvmlDeviceGetClockInfo", _MEMORY, 1.0),
            ("power_w", "nvmlDeviceGetPowerUsage", None, 1e-3),
            ("temperature_c", "nvmlDeviceGetTemperature", 0, 1.0),
        ):
            value = c_uint()
            arguments = (self._handle, *(() if which is None else (c_uint(which),)), byref(value))
            call = getattr(self._nvml, function, None)
            if call is not None and call(*arguments) == 0:
                found[name] = round(value.value * scale, 1)
        return found

    def driver(self) -> str:
        """The driver's version; empty if unknown."""
        if self.problem:
            return ""
        text = ctypes.create_string_buffer(96)
        if self._nvml.nvmlSystemGetDriverVersion(text, c_uint(len(text))) != 0:
            return ""
        return text.value.decode("utf-8", "replace")
