"""Leaving early without losing anything: SIGTERM and SIGUSR1 ask a run to end after the step it is in.

Schedulers send them before a time limit and on preemption. The run saves a checkpoint and ends with exit code 75
(`EX_TEMPFAIL`): start the same command again.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import NoReturn, Optional

UNFINISHED = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_asked: Optional[signal.Signals] = None


def leave() -> None:
    """From now on the signals end this process at once, with exit code 75: while there is nothing to save."""
    _handle(_leave)


def listen() -> None:
    """From now on this process notes the signals, for `asked`, and goes on."""
    _handle(_note)


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
