"""Numbers on their way from the device to the host, which does not wait for them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from runtime import machine


@dataclass
class InFlight:
    """A step's metrics on their way from the device, and what the host knew when it was queued."""

    values: torch.Tensor  # loss, norm, whether it was bad; at a check also norms of the update
    lr: float
    limit: float  # of the loss, by the guard
    first_window: int  # of the data order

    def __post_init__(self):
        self.arrived = None
        if self.values.device.type != "cpu":
            self.arrived = torch.Event(self.values.device)
            self.values = self.values.to("cpu", non_blocking=True)
            self.arrived.record()

    def wait(self, poll: Callable[[], None]) -> None:
        if self.arrived is not None:
            machine.wait_until(self.arrived, poll)
