"""What a rank is doing, told to NVIDIA's resiliency extension where its `ft_launcher` has started the ranks.

`ft_launcher` gives every rank a monitor process. That ends a rank which takes longer in a section than
`rank_section_timeouts` allows, or from one heartbeat to the next than `rank_heartbeat_timeout`; then all ranks are
started again, and the run continues from its last checkpoint. A section is a phase of the run (`start`, `rollout`,
`update`, `checkpoint`, `evaluation`); each begins with a heartbeat.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Optional

from nrt_megatron.recipe import print_notice

_SOCKET = "FT_RANK_MONITOR_IPC_SOCKET"


class Heartbeats:
    """The connection of this rank to its monitor; does nothing without one."""

    def __init__(self, client: Optional[Any] = None) -> None:
        """client: an initialised `RankMonitorClient`."""
        self._client = client
        # The monitor stops looking when it is told of a section that it has no limit for.
        self._limits = {} if client is None else client.cfg.rank_section_timeouts

    @contextmanager
    def section(self, phase: str) -> Iterator[None]:
        """phase: its first word, up to a comma, names the section."""
        if self._client is None:
            yield
            return
        name = phase.split(",")[0]
        self._client.send_heartbeat()
        if name in self._limits:
            self._client.start_section(name)
        yield  # left open by an error: the monitor ends a rank that does not get around to leaving
        if name in self._limits:
            self._client.end_section(name)


def connect(speaks: bool) -> Heartbeats:
    """Connects to the monitor that `ft_launcher` has given this rank, if it has.

    speaks: whether this rank says, in one line, that the extension is not installed where it is asked for.
    """
    if _SOCKET not in os.environ:
        return Heartbeats()
    try:
        from nvidia_resiliency_ext.fault_tolerance import RankMonitorClient
    except ImportError:
        if speaks:
            print_notice("no heartbeats for ft_launcher: nvidia-resiliency-ext is not installed for these ranks")
        return Heartbeats()
    client = RankMonitorClient()
    client.init_workload_monitoring()
    return Heartbeats(client)
