"""Where the time of a run goes: training, or everything else."""

import time
from collections.abc import Callable


class Clock:
    """Counts every stretch of time once, as training or as overhead (evaluation, checkpoints,
    histograms), so that step times contain nothing else (after big_vision's Chrono).

    The sums are in the train state, so they go on across restarts: `train_seconds`,
    `total_seconds`, `device_seconds` (the total times the number of processes) and `watt_seconds`
    (energy in joules).
    """

    def __init__(self, state, processes: int, energy: Callable[[], float]):
        """energy() returns the joules used since it was last called."""
        self._state, self._processes, self._energy = state, processes, energy
        self.restart()

    def restart(self) -> None:
        """Forget the time since the last stretch: nobody worked on the run in it."""
        self._mark = time.monotonic()

    def count_as_training(self) -> float:
        """Count the time since the last stretch as training; return its seconds."""
        seconds = self.count_as_overhead()
        self._state.train_seconds += seconds
        return seconds

    def count_as_overhead(self) -> float:
        """Count the time since the last stretch in the total alone; return its seconds."""
        now = time.monotonic()
        seconds, self._mark = now - self._mark, now
        self._state.total_seconds += seconds
        self._state.device_seconds += seconds * self._processes
        self._state.watt_seconds += self._energy()
        return seconds
