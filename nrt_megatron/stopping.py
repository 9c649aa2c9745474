"""Leaving early without losing anything: SIGTERM and SIGUSR1 ask a run to end after the step it is in.

Schedulers send them before a time limit and on preemption. The run saves a checkpoint and ends with exit code 75
(`EX_TEMPFAIL`): start the same command again.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import NoReturn, Optional

UNFINISHED = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

GRACE_S = 3.0
"""What a rank that is asked to stop while it starts waits for its peers: they may have been asked and left."""

_asked: Optional[signal.Signals] = None
_started = threading.Event()


class AskedToStop(Exception):
    """Raised on all ranks alike when one of them was asked to stop before there was anything to save."""


def leave() -> None:
    """From now on the signals end this process at once, with exit code 75: while there is nothing to save."""
    _handle(_leave)


def listen() -> None:
    """From now on this process notes the signals, for `asked`, and goes on."""
    _handle(_note)


def listen_while_starting() -> None:
    """As `listen`; until `started` is called, a signal also ends this process `GRACE_S` later, with exit code 75.

    A rank that waits for its peers does so in a library, where no handler of Python's runs: a thread looks.
    """
    listen()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    _started.clear()
    threading.Thread(target=_leave_unless_started, args=(reader,), daemon=True).start()


def started() -> None:
    """The ranks have met: from now on they agree on when to stop."""
    _started.set()
    writer = signal.set_wakeup_fd(-1)
    if writer >= 0:
        os.close(writer)


def _leave_unless_started(reader: int) -> None:
    with open(reader, "rb", buffering=0) as signals:
        while number := signals.read(1):
            if number[0] in SIGNALS and not _started.wait(GRACE_S):
                os._exit(UNFINISHED)


def ignore() -> None:
    """From now on the signals do nothing: for a process that is about to end with a code of its own."""
    _handle(signal.SIG_IGN)


def asked() -> Optional[signal.Signals]:
    """The last signal noted, None when there was none."""
    return _asked


def _handle(handler: object) -> None:
    for number in SIGNALS:
        signal.signal(number, handler)  # type: ignore[arg-type]


def _note(number: int, _frame: Optional[FrameType]) -> None:
    global _asked
    _asked = signal.Signals(number)


def _leave(number: int, frame: Optional[FrameType]) -> NoReturn:
    _note(number, frame)
    raise SystemExit(UNFINISHED)
