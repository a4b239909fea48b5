"""How far a long piece of work has come, as lines in the log."""

import logging
import time

_REPORT_EVERY_S = 5.0


class ProgressLog:
    """Logs a line every 10 % or 5 seconds, with the time that is left.

    Args:
        logger: takes the lines, at level INFO.
        unit: what is counted, as in `53 of 106 steps`.
        label: stands in front of each line, as in `state_dict.bin: 50 %, ...`.
        scale: how much of what `update` counts makes one unit, such as 1_000_000 bytes for MB.
        start: what was done before this began, and tells nothing about the speed.
        quiet_s: seconds without a line, for work that mostly ends before.
    """

    def __init__(
        self,
        logger: logging.Logger,
        unit: str,
        label: str = "",
        scale: int = 1,
        start: int = 0,
        quiet_s: float = 0.0,
    ) -> None:
        self.done = start
        self._logger = logger
        self._unit = unit
        self._label = f"{label}: " if label else ""
        self._scale = scale
        self._start = start
        self._tenth = 0
        self._quiet_s = quiet_s
        self._begin = self._reported = time.perf_counter()

    def update(self, done: int, total: int) -> None:
        """Take note of work that is finished; `done` and `total` may grow between calls."""
        self.done = done
        now = time.perf_counter()
        tenth = 10 * done // total
        due = tenth > self._tenth or now - self._reported >= _REPORT_EVERY_S
        if not due or now - self._begin < self._quiet_s:
            return
        left = (now - self._begin) / max(1, done - self._start) * (total - done)
        self._logger.info(
            "%s%3d %%, %d of %d %s, %.0f s left",
            self._label,
            100 * done // total,
            done // self._scale,
            total // self._scale,
            self._unit,
            left,
        )
        self._tenth, self._reported = tenth, now
