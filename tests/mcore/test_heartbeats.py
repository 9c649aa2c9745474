"""Phases of a run as heartbeats and sections of nvidia-resiliency-ext: a stand-in for it, itself where installed."""

from __future__ import annotations

import sys
import time
from types import ModuleType, SimpleNamespace

import pytest

from nrt_megatron.mcore import heartbeats
from tests.distributed import run_ranks

SOCKET = "FT_RANK_MONITOR_IPC_SOCKET"


class Client:
    """Of `RankMonitorClient` (0.4) what is used, and the refusals of its server."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.cfg = SimpleNamespace(rank_section_timeouts={"update": 60.0})

    def init_workload_monitoring(self) -> None:
        self.said.append("hello")

    def send_heartbeat(self) -> None:
        self.said.append("heartbeat")

    def start_section(self, name: str) -> None:
        assert name in self.cfg.rank_section_timeouts and f"start {name}" not in self.said
        self.said.append(f"start {name}")

    def end_section(self, name: str) -> None:
        self.said.remove(f"start {name}")
        self.said.append(f"end {name}")


@pytest.fixture
def standin(monkeypatch) -> None:
    monkeypatch.setenv(SOCKET, "/nowhere")
    for name in ("nvidia_resiliency_ext", "nvidia_resiliency_ext.fault_tolerance"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["nvidia_resiliency_ext.fault_tolerance"].RankMonitorClient = Client


def test_phases_are_sections_where_they_have_a_limit(standin):
    beats = heartbeats.connect(speaks=True)
    with beats.section("rollout, step 3"):
        pass
    with beats.section("update, step 3"):
        assert beats._client.said == ["hello", "heartbeat", "heartbeat", "start update"]
    assert beats._client.said == ["hello", "heartbeat", "heartbeat", "end update"]


def test_an_error_leaves_its_section_open(standin):
    """The monitor then ends a rank whose way out hangs."""
    beats = heartbeats.connect(speaks=True)
    with pytest.raises(RuntimeError), beats.section("update, step 3"):
        raise RuntimeError
    assert beats._client.said[-1] == "start update"


def test_without_ft_launcher_nothing_is_imported(monkeypatch):
    monkeypatch.delenv(SOCKET, raising=False)
    monkeypatch.setitem(sys.modules, "nvidia_resiliency_ext", None)
    with heartbeats.connect(speaks=True).section("update, step 3"):
        pass


@pytest.mark.parametrize("speaks", [True, False])
def test_ft_launcher_of_another_environment(monkeypatch, capsys, speaks):
    monkeypatch.setenv(SOCKET, "/nowhere")
    monkeypatch.setitem(sys.modules, "nvidia_resiliency_ext", None)
    with heartbeats.connect(speaks).section("update, step 3"):
        pass
    said = capsys.readouterr().err
    assert said.count("\n") == speaks and ("nvidia-resiliency-ext is not installed" in said) == speaks


def hang() -> None:
    beats = heartbeats.connect(speaks=True)
    for seconds, phase in ((0.0, "update, step 1"), (2.0, "rollout, step 2"), (60.0, "update, step 2")):
        with beats.section(phase):
            print(phase)
            time.sleep(seconds)


def test_a_real_monitor_ends_a_rank_that_hangs(monkeypatch, tmp_path):
    """In `update`, after one second of it; two in `rollout`, which has no limit, are none of its business."""
    package = pytest.importorskip("nvidia_resiliency_ext.fault_tolerance", reason="nvidia-resiliency-ext not installed")
    limits = {"workload_check_interval": 0.2, "rank_section_timeouts": {"update": 1.0}, "enable_nic_monitor": False}
    monkeypatch.setenv(SOCKET, str(tmp_path / "socket"))
    monitor = package.RankMonitorServer.run_in_subprocess(
        package.FaultToleranceConfig.from_kwargs(**limits), str(tmp_path / "socket")
    )
    try:
        with pytest.raises(AssertionError, match=r"rank 0 ended with -9[\s\S]*update, step 2"):
            run_ranks(1, hang, timeout=30)
    finally:
        monitor.terminate()
        monitor.join()
