"""Stop a run politely: the first signal asks it to finish its step and save, a second Ctrl-C leaves at once.

Without this a scheduler's SIGTERM would cost everything since the last checkpoint.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
"""Ctrl-C; what schedulers send before they kill (Slurm also sends SIGUSR1 when asked to)"""


class StopRequest:
    """Context manager; `name` is the signal that asked for a stop, None until then.

    Outside the main thread Python cannot install handlers; there the context does nothing.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._owner = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in STOPPING}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            # a forked loader worker: it ignores Ctrl-C, because the run that owns it still needs its batches
            if number != signal.SIGINT:
                os._exit(128 + number)
            return
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
