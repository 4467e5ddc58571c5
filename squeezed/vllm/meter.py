"""Keys that requests read, counted where they are read, and told without a wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor


class HostMeter:
    """Counts on the CPU: what is told is complete."""

    def __init__(self) -> None:
        self.counted: dict[str, list[int]] = {}
        self._touched: set[str] = set()

    def count(self, requests: list[str], read: Tensor, available: int) -> None:
        """`read [N]` more keys, of `available` for each of the requests."""
        for request, keys in zip(requests, read.tolist(), strict=True):
            both = self.counted.setdefault(request, [0, 0])
            both[0] += keys
            both[1] += available
            self._touched.add(request)

    def told(self) -> dict[str, tuple[int, int]]:
        """Of requests that read since the last call, all that they read and could have read."""
        touched, self._touched = self._touched, set()
        known = ((name, self.counted[name]) for name in touched if name in self.counted)
        return {name: (read, available) for name, (read, available) in known}

    def forget(self, request: str) -> None:
        self.counted.pop(request, None)


class DeviceMeter:
    """Counts on a GPU, in a slot for each request; what is told is of a moment before.

    Numbers are copied while later kernels run: `told` gives those of the last copy that has
    arrived, with the keys that could have been read by then.
    """

    def __init__(self, device: torch.device, slots: int) -> None:
        self.device = device
        self.total = torch.zeros(slots, dtype=torch.int64, device=device)
        self.arrived = torch.zeros(slots, dtype=torch.int64, pin_memory=True)
        self.slots: dict[str, int] = {}
        self.available: dict[str, int] = {}
        self._free = list(range(slots))[::-1]
        self._places: dict[tuple[str, ...], Tensor] = {}
        self._copied: tuple[torch.cuda.Event, dict[str, tuple[int, int]]] | None = None
        self._touched = False

    def places(self, requests: tuple[str, ...]) -> Tensor:
        """The slots of requests `[N]` int64, on the device; made once while they stay together."""
        if requests not in self._places:
            for request in requests:
                if request not in self.slots:
                    self.slots[request] = self._free.pop()
                    self.available[request] = 0
            own = torch.tensor([self.slots[request] for request in requests]).pin_memory()
            self._places[requests] = own.to(self.device, non_blocking=True)
        return self._places[requests]

    def count(self, requests: list[str], read: Tensor, available: int) -> None:
        """`read [N]` more keys, of `available` for each of the requests."""
        self.total.index_add_(0, self.places(tuple(requests)), read)
        for request in requests:
            self.available[request] += available
        self._touched = True

    def told(self) -> dict[str, tuple[int, int]]:
        """What the last copy said, once it has arrived; then another one is begun."""
        found = {}
        if self._copied is not None and self._copied[0].query():
            _, then = self._copied
            numbers = self.arrived.tolist()
            found = {name: (numbers[slot], available) for name, (slot, available) in then.items()}
            self._copied = None
        if self._copied is None and self._touched:
            self._touched = False
            self.arrived.copy_(self.total, non_blocking=True)
            then = {name: (slot, self.available[name]) for name, slot in self.slots.items()}
            self._copied = torch.cuda.current_stream(self.device).record_event(), then
        return found

    def forget(self, request: str) -> None:
        """A request is over: its slot is another's."""
        slot = self.slots.pop(request, None)
        if slot is None:
            return
        del self.available[request]
        self.total[slot] = 0
        self._free.append(slot)
        for together in [names for names in self._places if request in names]:
            del self._places[together]
