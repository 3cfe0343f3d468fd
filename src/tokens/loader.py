"""The loader: a rank's share of each training step, read ahead by a thread."""

import queue
import threading
import weakref
from collections.abc import Callable

import numpy as np

from tokens.stream import WindowSource

AHEAD = 2  # batches that wait to be taken


class StepLoader:
    """This rank's windows of one training step after the other, read ahead by a thread.

    next() gives an int64 tensor (windows_per_step / world_size, T+1) on `device`; rank r has the
    r-th slice of the step's windows. position: the window at which the next batch begins, counted
    over all ranks. On CUDA the thread also sends the batches, from two pinned buffers on a stream
    of its own, so that they wait on the device.
    """

    def __init__(
        self,
        source: WindowSource,
        windows_per_step: int,
        rank: int,
        world_size: int,
        device,
        position: int = 0,
    ):
        import torch

        self.source, self.rank, self.world_size = source, rank, world_size
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        if windows_per_step % world_size:
            raise ValueError(
                f"{windows_per_step} windows in a step cannot be shared by {world_size} "
                f"processes: make it a multiple of {world_size}"
            )
        self.windows_per_step = windows_per_step
        self._stop = lambda: None
        self.seek(position)

    def seek(self, position: int) -> None:
        """Go on at another position."""
        self.close()
        self.position, self._error = position, None
        self._ready: queue.Queue = queue.Queue(AHEAD)
        stopped = threading.Event()
        share = self.windows_per_step // self.world_size
        arguments = (self.source, position + self.rank * share, share, self.windows_per_step)
        # The thread knows nothing of this object, which may thus be forgotten without close().
        thread = threading.Thread(
            target=_read_ahead,
            args=(*arguments, self.device, self._ready, stopped),
            name="data loader",
            daemon=True,
        )
        self._stop = weakref.finalize(self, _halt, thread, self._ready, stopped)
        thread.start()

    def next_batch(self, poll: Callable[[], None] | None = None):
        """Return the next batch. While there is none yet, poll() is called five times a second; it
        may raise. What went wrong in the thread is raised here."""
        if self._error is not None:
            raise self._error
        while True:
            try:
                batch, copied = self._ready.get(timeout=0.2)
                break
            except queue.Empty:
                if poll is not None:
                    poll()
        if isinstance(batch, BaseException):
            self._error = batch
            raise batch
        self.position += self.windows_per_step
        if copied is not None:
            import torch

            # The copy ran on another stream: let ours wait for it, and keep the allocator from
            # reusing the memory there while ours still reads it.
            current = torch.cuda.current_stream(self.device)
            current.wait_event(copied)
            batch.record_stream(current)
        return batch if batch.device == self.device else batch.to(self.device)

    def close(self) -> None:
        """End the thread."""
        self._stop()
        self._error = RuntimeError("this StepLoader is closed")


def _read_ahead(source, first, share, stride, device, ready, stopped) -> None:
    """Put (tensor, event or None), one after the other, or (exception, None) into `ready`."""
    import torch

    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # per thread; else pinning would wake up GPU 0 as well
            stream = torch.cuda.Stream()
            shape = (share, source.T + 1)
            buffers = [torch.empty(shape, dtype=torch.int32).pin_memory() for _ in range(2)]
            events: list = [None, None]
        number = 0
        while not stopped.is_set():
            windows = source.windows(np.arange(first, first + share))
            if device.type == "cuda":
                slot = number % 2
                if events[slot] is not None:
                    events[slot].synchronize()  # the device has read this buffer
                buffers[slot].numpy()[:] = windows
                with torch.cuda.stream(stream):
                    batch = buffers[slot].to(device, non_blocking=True).long()
                    events[slot] = torch.cuda.Event()
                    events[slot].record(stream)
                ready.put((batch, events[slot]))
            else:
                ready.put((torch.from_numpy(windows.astype(np.int64)), None))
            first, number = first + stride, number + 1
    except BaseException as error:
        ready.put((error, None))


def _halt(thread, ready, stopped) -> None:
    """End a loader's thread: it may be waiting for room in the queue."""
    stopped.set()
    for _ in range(100):  # 5 s: a read from a dead network disk must not hold up the end
        if not thread.is_alive():
            return
        try:
            ready.get_nowait()
        except queue.Empty:
            thread.join(0.05)
