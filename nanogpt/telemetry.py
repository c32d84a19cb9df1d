"""The sensors and the health of one GPU, read in a thread through NVML (nvidia-ml-py).

What is wrong is told when it begins: Xid errors, uncorrected ECC errors, remapped memory rows, throttling, heat.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from types import ModuleType

import torch

# NVIDIA's "Xid errors" guide: what the user is to do about the frequent ones
XIDS = {
    13: "an error in a kernel",
    31: "a memory page fault, by a kernel or the hardware",
    48: "a double-bit ECC error: reset the GPU",
    63: "a memory row was remapped: reset the GPU soon",
    64: "a memory row could not be remapped: replace the GPU",
    74: "an NVLink error",
    79: "the GPU has fallen off the bus: reset or replace it",
    92: "many single-bit ECC errors",
    94: "a contained ECC error: restart the run",
    95: "an uncontained ECC error: reset the GPU",
    119: "the GPU's system processor does not answer: reset the GPU",
}
THROTTLING = {  # bits of nvmlDeviceGetCurrentClocksEventReasons that are not the normal power cap or idleness
    "HwSlowdown": "hardware slowdown",
    "SwThermalSlowdown": "heat",
    "HwThermalSlowdown": "heat, by the hardware",
    "HwPowerBrakeSlowdown": "the power supply",
}
KEPT = 3600  # readings that wait for read(), which only the main process calls
AGAIN = 600.0  # seconds after which what lasts, or comes back, is told again


class Telemetry:
    """Reads one GPU every second, in a thread.

    Args:
        device: whose.
        nvml: the module pynvml; another in tests.
        interval: seconds between readings.
        warn: called, from the thread, with each line about the GPU's health.

    Attributes:
        missing: why there is nothing to read; empty if there is.
    """

    def __init__(
        self,
        device: torch.device,
        nvml: ModuleType | None = None,
        interval: float = 1.0,
        warn: Callable[[str], None] = lambda message: None,
    ):
        self.samples: deque[dict[str, float]] = deque(maxlen=KEPT)
        self.device, self.warn = device, warn
        self._lock, self._stop, self._thread = threading.Lock(), threading.Event(), None
        self._counts: dict[str, int] = {}
        self._lasting: dict[str, float] = {}  # trouble that comes and goes: when it was last told
        self.missing = self._open(device, nvml)
        if not self.missing:
            self._thread = threading.Thread(target=self._poll, args=(interval,), name="telemetry", daemon=True)
            self._thread.start()

    def _open(self, device: torch.device, nvml: ModuleType | None) -> str:
        if device.type != "cuda":
            return f"none for device {device.type}"
        if nvml is None:
            try:
                import pynvml as nvml
            except ImportError:
                return "nvidia-ml-py is not installed"
        self.nvml = nvml
        try:
            nvml.nvmlInit()
            # NVML numbers all GPUs of the machine, torch those of CUDA_VISIBLE_DEVICES
            self.handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        except nvml.NVMLError as error:
            return str(error)
        return ""

    def _poll(self, interval: float) -> None:
        self._hot = self._try(
            lambda: self.nvml.nvmlDeviceGetTemperatureThreshold(self.handle, self.nvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN)
        )
        events = self._try(self._listen)
        self._health()  # what was there before the run is told as well
        while not self._stop.wait(interval):
            sample = self._sample()
            with self._lock:
                self.samples.append(sample)
            self._health(sample.get("gpu_temperature_c"))
            self._xids(events)
        if events is not None:
            self._try(lambda: self.nvml.nvmlEventSetFree(events))

    def _try(self, read: Callable[[], object]) -> object:
        """What a reading gives; None for what this GPU, or its driver, lacks."""
        try:
            return read()
        except self.nvml.NVMLError:
            return None

    def _sample(self) -> dict[str, float]:
        nvml, handle = self.nvml, self.handle
        sensors = {
            "gpu_util": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu,  # percent
            "gpu_memory_gib": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used / 2**30,
            "gpu_power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            "gpu_temperature_c": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            "gpu_sm_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
        }
        values = {name: self._try(read) for name, read in sensors.items()}
        return {name: float(value) for name, value in values.items() if value is not None}

    def _listen(self) -> object:
        nvml = self.nvml
        events = nvml.nvmlEventSetCreate()
        nvml.nvmlDeviceRegisterEvents(self.handle, nvml.nvmlEventTypeXidCriticalError, events)
        return events

    def _xids(self, events: object) -> None:
        """All Xids since the last call."""
        while events is not None:
            event = self._try(lambda: self.nvml.nvmlEventSetWait_v2(events, 0))
            if event is None:  # a timeout: there are no more
                return
            number = int(event.eventData)
            self._tell(f"Xid {number}" + (f", {XIDS[number]}" if number in XIDS else ""))

    def _health(self, temperature: float | None = None) -> None:
        nvml, handle = self.nvml, self.handle
        errors = self._try(
            lambda: nvml.nvmlDeviceGetTotalEccErrors(handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC)
        )
        self._grows("uncorrected ECC errors since the driver was loaded", errors)
        rows = self._try(lambda: nvml.nvmlDeviceGetRemappedRows(handle))
        if rows is not None:
            corrected, uncorrected, pending, failed = rows
            self._grows("memory rows remapped after uncorrected errors", uncorrected)
            self._grows("memory rows remapped after corrected errors", corrected)
            self._lasts("a row remapping is pending: reset the GPU", bool(pending))
            self._lasts("a row remapping has failed: replace the GPU", bool(failed))
        reasons = self._try(lambda: nvml.nvmlDeviceGetCurrentClocksEventReasons(handle))
        for name, what in THROTTLING.items():
            if reasons is not None:
                self._lasts(f"clocks are throttled by {what}", bool(reasons & getattr(nvml, f"nvmlClocksEventReason{name}")))
        if temperature is not None and self._hot is not None:
            self._lasts(f"at {self._hot} C, where it slows down, or above", temperature >= self._hot)

    def _grows(self, what: str, count: int | None) -> None:
        if count is not None and count > self._counts.get(what, 0):
            self._tell(f"{count} {what}")
            self._counts[what] = count

    def _lasts(self, what: str, now: bool) -> None:
        if now and time.monotonic() - self._lasting.get(what, -AGAIN) >= AGAIN:
            self._tell(what)
            self._lasting[what] = time.monotonic()

    def _tell(self, what: str) -> None:
        self.warn(f"GPU health: {self.device}: {what}")

    def read(self) -> dict[str, float]:
        """The mean of each sensor since the last call, over an hour at most; empty where nothing was measured."""
        with self._lock:
            samples = list(self.samples)
            self.samples.clear()
        names = {name for sample in samples for name in sample}
        values = {name: [sample[name] for sample in samples if name in sample] for name in sorted(names)}
        return {name: sum(v) / len(v) for name, v in values.items()}

    def close(self) -> None:
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self.nvml.nvmlShutdown()
