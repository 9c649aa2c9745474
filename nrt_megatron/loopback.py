"""A rendezvous for ranks on one machine, whose store listens on 127.0.0.1 alone.

Torch's own listens on every interface of the machine, knows no password, and unpickles what its store holds.
"""

from __future__ import annotations

import socket

from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import RendezvousParameters, rendezvous_handler_registry
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

BACKEND = "nrt-loopback"
ADDRESS = "127.0.0.1"
_TIMEOUT_S = 300


class _Loopback(StaticTCPRendezvous):
    """One node; its store is handed a socket that listens already."""

    def __init__(self, run_id: str) -> None:
        listener = socket.create_server((ADDRESS, 0))
        port = listener.getsockname()[1]
        super().__init__(ADDRESS, port, rank=0, world_size=1, run_id=run_id, timeout=_TIMEOUT_S)
        self._store = TCPStore(ADDRESS, port, None, True, self.timeout, master_listen_fd=listener.detach())

    def get_backend(self) -> str:
        return BACKEND


def _create(params: RendezvousParameters) -> _Loopback:
    return _Loopback(params.run_id)


def register() -> None:
    """Makes BACKEND known to torch's launcher."""
    rendezvous_handler_registry.register(BACKEND, _create)
