"""nanogpt.monitor: rates against arithmetic, sensors against a fake NVML, the metrics file, the lines printed."""

import errno
import json
import os
import pty
import re
import subprocess
import sys
import threading
import types

import pytest
import torch

from nanogpt import checkpoint, monitor
from nanogpt.config import TrainConfig
from nanogpt.monitor import Console, MetricsFile, Monitor, Throughput, duration, peak_flops, write_status
from nanogpt.telemetry import Telemetry
from tests.runs import ROOT, arguments, status, walk


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312e12),
        ("NVIDIA A100-PCIE-40GB", torch.float16, 312e12),
        ("NVIDIA A100-SXM4-40GB", torch.float32, 156e12),  # TF32
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756e12),
        ("NVIDIA H200", torch.bfloat16, 989e12),
        ("NVIDIA A10", torch.bfloat16, 125e12),
        ("NVIDIA L4", torch.bfloat16, 121e12),
        ("NVIDIA L40S", torch.bfloat16, 362e12),
        ("Tesla T4", torch.float16, 65e12),
        ("Tesla T4", torch.bfloat16, None),
        ("Tesla V100-SXM2-16GB", torch.float32, None),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16, None),
        ("NVIDIA GeForce RTX 3090 Ti", torch.bfloat16, None),
        ("NVIDIA A10G", torch.bfloat16, None),
        ("Some GPU of 2030", torch.bfloat16, None),
    ],
)
def test_peak_is_known_or_refused(name, dtype, peak):
    assert peak_flops(name, dtype) == peak


def test_throughput_leaves_out_what_start_follows():
    now = iter([0.0, 0.5, 1.0, 9.0, 10.0, 10.25])
    throughput = Throughput(tokens=1000, flops=900, flops_causal=850, peak=1e7, clock=lambda: next(now))
    throughput.step()
    throughput.step()
    assert throughput.rates() == pytest.approx({"ms": 500, "tokens_per_s": 2000, "mfu": 0.18, "mfu_causal": 0.17})
    throughput.start()  # 8 s of evaluation
    throughput.step()
    throughput.step()
    assert throughput.rates()["ms"] == pytest.approx(625)


def test_unknown_peak_gives_no_mfu():
    throughput = Throughput(1000, 900, 850, None)
    throughput.step()
    assert throughput.rates().keys() == {"ms", "tokens_per_s"}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (72.4, "1m12s"), (3599.6, "1h00m"), (7384, "2h03m"), (90000, "1d01h")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


class FakeNvml(types.SimpleNamespace):
    """Two readings, then silence; the temperature sensor is missing, and all that tells of the GPU's health."""

    class NVMLError(Exception):
        pass

    NVML_TEMPERATURE_GPU, NVML_CLOCK_SM = 0, 1

    def __init__(self, broken=False):
        super().__init__(broken=broken, uuid=None, power=iter([300_000, 400_000]), read_twice=threading.Event(), open=0)

    def nvmlInit(self):  # noqa: N802
        if self.broken:
            raise self.NVMLError("Driver Not Loaded")
        self.open += 1

    def nvmlShutdown(self):  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
        self.uuid = uuid
        return "handle"

    def nvmlDeviceGetUtilizationRates(self, handle):  # noqa: N802
        return types.SimpleNamespace(gpu=97)

    def nvmlDeviceGetMemoryInfo(self, handle):  # noqa: N802
        return types.SimpleNamespace(used=3 * 2**30)

    def nvmlDeviceGetPowerUsage(self, handle):  # noqa: N802
        value = next(self.power, None)
        if value is None:
            self.read_twice.set()
            raise self.NVMLError("Unknown Error")
        return value

    def nvmlDeviceGetTemperature(self, *args):  # noqa: N802
        raise self.NVMLError("Not Supported")

    def nvmlDeviceGetClockInfo(self, handle, clock):  # noqa: N802
        return 1410

    NVML_TEMPERATURE_THRESHOLD_SLOWDOWN = NVML_MEMORY_ERROR_TYPE_UNCORRECTED = NVML_VOLATILE_ECC = 1
    nvmlDeviceGetTemperatureThreshold = nvmlDeviceGetTotalEccErrors = nvmlDeviceGetTemperature  # noqa: N815
    nvmlDeviceGetRemappedRows = nvmlDeviceGetCurrentClocksEventReasons = nvmlEventSetCreate = nvmlDeviceGetTemperature  # noqa: N815


def fake_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="abc-1"))
    return torch.device("cuda", 0)


def test_telemetry_averages_the_sensors_there_are(monkeypatch):
    nvml = FakeNvml()
    telemetry = Telemetry(fake_gpu(monkeypatch), nvml, interval=0.001)
    assert telemetry.missing == ""
    assert nvml.read_twice.wait(10)
    values = telemetry.read()
    telemetry.close()
    assert values == {"gpu_util": 97, "gpu_memory_gib": 3, "gpu_power_w": 350, "gpu_sm_mhz": 1410}
    assert nvml.uuid == "GPU-abc-1"
    assert nvml.open == 0
    assert not telemetry._thread.is_alive()


def test_telemetry_that_nobody_reads_does_not_grow(monkeypatch):
    monkeypatch.setattr("nanogpt.telemetry.KEPT", 5)
    nvml = FakeNvml()
    nvml.power = iter(range(0, 20_000, 1000))
    telemetry = Telemetry(fake_gpu(monkeypatch), nvml, interval=0.001)
    assert nvml.read_twice.wait(10)
    telemetry.close()
    assert len(telemetry.samples) == 5
    assert telemetry.read()["gpu_util"] == 97
    assert telemetry.read() == {}


@pytest.mark.parametrize("why", ["no driver", "no package", "no GPU"])
def test_telemetry_missing_is_said_and_harmless(monkeypatch, why):
    device = torch.device("cpu") if why == "no GPU" else fake_gpu(monkeypatch)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    telemetry = Telemetry(device, FakeNvml(broken=True) if why == "no driver" else None)
    expected = {
        "no driver": "Driver Not Loaded",
        "no package": "nvidia-ml-py is not installed",
        "no GPU": "none for device cpu",
    }
    assert telemetry.missing == expected[why]
    assert telemetry.read() == {}
    telemetry.close()


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_r06_metrics_wait_in_memory_while_the_disk_is_full(tmp_path, caplog):
    file = MetricsFile(tmp_path / "metrics.jsonl", 0, False, False)
    whole = file.file
    with open("/dev/full", "ab", buffering=0) as file.file:
        for it in range(2):
            file.write({"kind": "train", "iter": it})
    file.file = whole
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    assert caplog.text.count("/dev/full: No space left on device; its lines wait in memory") == 1
    file.write({"kind": "train", "iter": 2})
    file.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iter"] for line in lines] == [0, 1, 2]


def test_r06_a_full_disk_behind_stdout_or_the_status_ends_no_run(tmp_path, caplog, monkeypatch):
    full = open("/dev/full", "w", buffering=1)  # noqa: SIM115 - not even its closing succeeds
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        Console(0, 1).print("line")
    with pytest.raises(OSError, match="No space"):
        full.close()
    (tmp_path / ".status.json").symlink_to("/dev/full")
    write_status(tmp_path, 3, "running")
    assert "status.json: not written: No space left on device" in caplog.text


INTERRUPTED = """
import os, signal, sys
from nanogpt import config, monitor, train
put = monitor.Monitor.train
def signalled(self, it, *args):
    if it == 3:
        signal.raise_signal(signal.SIGINT)
        os.read(0, 1)  # by when its reader is gone
    put(self, it, *args)
monitor.Monitor.train = signalled
sys.exit(train.main(config.load(config.TrainConfig, sys.argv[1:])))
"""


def test_r13_a_run_whose_reader_ctrl_c_has_ended_is_saved(tmp_path):
    """As in `python -m nanogpt.train ... | tee log`, where Ctrl-C goes to both."""
    data = tmp_path / "data"
    data.mkdir()
    command = [sys.executable, "-c", INTERRUPTED, *arguments(walk(data), tmp_path / "out", max_iters=50)]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdin=-1, stdout=-1, stderr=-1, text=True)
    while not process.stdout.readline().startswith("iter 2:"):
        assert process.poll() is None
    process.stdout.close()
    process.stdin.close()
    assert (process.wait(60), process.stderr.read()) == (0, "")
    assert (status(tmp_path / "out")["state"], status(tmp_path / "out")["iter"]) == ("preempted", 5)
    assert checkpoint.steps(tmp_path / "out") == [5]


def test_metrics_file_drops_what_will_happen_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0, False, False)
    for kind, it in (("start", 0), ("eval", 0), ("train", 0), ("train", 1), ("eval", 2), ("train", 2), ("train", 3)):
        file.write({"kind": kind, "iter": it, "loss": float("nan")})
    file.close()
    with open(path, "a") as cut:
        cut.write('{"kind": "train", "it')
    for evaluated in (True, False):
        MetricsFile(path, 2, evaluated, True).close()
        kept = [(r["kind"], r["iter"]) for r in records(path)]
        assert kept == [("start", 0), ("eval", 0), ("train", 0), ("train", 1)] + [("eval", 2)] * evaluated
    assert records(path)[1]["loss"] == "nan"
    MetricsFile(path, 0, True, True).close()  # stopped after its first evaluation, and resumed
    assert [(r["kind"], r["iter"]) for r in records(path)] == [("start", 0), ("eval", 0)]
    MetricsFile(path, 0, False, False).close()  # from scratch
    assert path.read_text() == ""


def new_monitor(tmp_path, peak=1e6, **keys):
    config = TrainConfig(out_dir=str(tmp_path), max_iters=100, log_interval=10, **keys)
    now = iter(range(1000))
    return Monitor(config, torch.device("cpu"), Throughput(64, 1000, 900, peak, lambda: next(now)), 0, False, False)


def test_monitor_prints_nanogpts_lines_and_records_them(tmp_path, capsys):
    log = new_monitor(tmp_path)
    figures = {"train_loss": 4.25, "val_loss": 4.5, "hellaswag_acc_norm": 0.25, "hellaswag_acc_norm_stderr": 0.5}
    log.evaluation(0, figures)
    for it in range(12):
        log.train(it, 4.0 - it / 10, 1.5, 1e-3)
    log.close(12, "finished")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 0: train loss 4.2500, val loss 4.5000, hellaswag acc norm 0.2500"
    assert [line.split(":")[0] for line in lines[1:]] == ["iter 0", "iter 10", "goodput"]
    assert re.match(
        r"iter 10: loss 3\.0000, time 1000\.00ms, mfu 6\.40%, causal 5\.76%, lr 1\.00e-03, norm 1\.500, 64 tok/s", lines[2]
    )
    assert lines[2].endswith("eta 1m29s")
    found = records(tmp_path / "metrics.jsonl")
    assert [r["kind"] for r in found] == ["start", "eval", "train", "train", "end"]
    assert found[1].items() >= figures.items()
    assert found[3]["tokens"] == 11 * 64
    assert found[3].keys() >= {"loss", "lr", "grad_norm", "ms", "tokens_per_s", "mfu", "mfu_causal", "eta_s", "time"}
    assert found[4]["state"] == "finished"


def test_monitor_reports_a_skipped_update_at_once(tmp_path, capsys):
    log = new_monitor(tmp_path, peak=None)
    log.train(3, float("nan"), float("inf"), 1e-3, "not finite")
    log.close(4, "failed")
    out = capsys.readouterr().out
    assert "iter 3: loss nan" in out
    assert "mfu n/a" in out
    assert out.splitlines()[0].endswith("not finite, update skipped")
    assert records(tmp_path / "metrics.jsonl")[1]["grad_norm"] == "inf"


def test_trackers_get_numbers_only_and_a_full_disk_ends_them_alone(tmp_path, monkeypatch, caplog):
    seen = []

    def add(name, value, it):
        if it == 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        seen.append((name, value, it))

    writer = types.SimpleNamespace(add_scalar=add, close=lambda: (seen.append("closed"), add("", 0, 6)))
    at_exit = []
    monkeypatch.setattr(monitor.atexit, "register", at_exit.append)
    fake = types.SimpleNamespace(SummaryWriter=lambda path: writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    runs = types.SimpleNamespace(
        init=lambda **keys: types.SimpleNamespace(log=lambda values, step: seen.append((values, step)))
    )
    monkeypatch.setitem(sys.modules, "wandb", runs)
    log = new_monitor(tmp_path, tensorboard=True, wandb_log=True)
    for it in (5, 6, 7):  # the disk is full at 6
        log.evaluation(it, {"val_loss": 2.5})
    log.close(7, "finished")
    assert seen == [("eval/val_loss", 2.5, 5), *(({"eval/val_loss": 2.5}, it) for it in (5, 6, 7))]
    assert caplog.text.count("a tracker is given up: [Errno 28] No space left on device") == 1
    at_exit[0]()
    assert (len(at_exit), seen[-1]) == (1, "closed")


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb_log", "wandb")])
def test_missing_tracker_is_one_clear_line(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"{name}=True: not installed; pip install"):
        monitor.trackers(TrainConfig(**{name: True}), tmp_path)


def test_console_draws_progress_on_a_terminal(monkeypatch):
    controller, terminal = pty.openpty()
    with open(terminal, "w") as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        patch.setenv("TERM", "xterm")
        patch.setenv("COLUMNS", "80")
        console = monitor.Console(0, 100)
        console.print("iter 0: loss [1.0]")
        console.advance(40)
        console.close()
    text = ""
    try:
        while True:
            text += os.read(controller, 100_000).decode()
    except OSError:  # how Linux reports the end of a terminal
        os.close(controller)
    assert "iter 0: loss [1.0]\r\n" in text  # brackets are no markup
    assert "40/100" in text
