"""Which contexts are in the engine's memory: the scheduler's plan, which the workers carry out.

A context is loaded when a request asks for it; the least recently used ones go if room is needed,
never one that a request reads. If only those are left, no new reader joins the ones that must go,
until their readers have ended: whoever waits is served.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from squeezed.errors import SqueezedError

LOADING, READY, FAILED = "loading", "ready", "failed"

Place = TypeVar("Place")


@dataclass
class Resident(Generic[Place]):
    """A context in memory, or on its way."""

    place: Place
    bytes: int
    state: str = LOADING
    why: str = ""
    readers: set[str] = field(default_factory=set)


@dataclass
class Orders(Generic[Place]):
    """What the workers must do before the next step, evictions first."""

    evict: list[str] = field(default_factory=list)
    load: dict[str, Place] = field(default_factory=dict)


class Residency(Generic[Place]):
    """A plan of the memory for contexts, `capacity` bytes on every rank."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held: OrderedDict[str, Resident[Place]] = OrderedDict()
        self.orders: Orders[Place] = Orders()
        self.waiting_for_room: dict[str, set[str]] = {}
        """Reader -> keys that must go before it can begin."""

    @property
    def used(self) -> int:
        return sum(one.bytes for one in self.held.values())

    def read(self, key: str, place: Place, size: int, reader: str) -> bool:
        """Let `reader` read a context; whether it may begin, else ask again later.

        Raises:
            SqueezedError: the context is larger than all the memory, or could not be loaded.
        """
        one = self.held.get(key)
        if one is None:
            if not self._has_room(size, reader):
                return False
            one = self.held[key] = Resident(place, size)
            self.orders.load[key] = place
        if one.state == FAILED:
            raise SqueezedError(one.why)
        if reader not in one.readers and self._must_go(key):
            return False
        one.readers.add(reader)
        self.held.move_to_end(key)
        return one.state == READY

    def ended(self, key: str, reader: str) -> None:
        """A reader has left, or one that waited."""
        self.waiting_for_room.pop(reader, None)
        if key in self.held:
            self.held[key].readers.discard(reader)

    def loaded(self, key: str) -> None:
        """All workers have it."""
        if key in self.held and self.held[key].state == LOADING:
            self.held[key].state = READY

    def failed(self, key: str, why: str) -> None:
        """A worker could not load it: nobody waits for it, and what others have of it goes."""
        if key in self.held and self.held[key].state != FAILED:
            self.held[key] = Resident(self.held[key].place, 0, FAILED, why)
            self.orders.evict.append(key)

    def forget_failures(self) -> None:
        """Let contexts that could not be loaded be tried again."""
        for key in [key for key, one in self.held.items() if one.state == FAILED]:
            del self.held[key]

    def drop_unread(self, keep: set[str]) -> None:
        """Evict what nobody reads and nobody will ask for again."""
        for key in self._unread():
            if key not in keep:
                self._evict(key)

    def take_orders(self) -> Orders[Place]:
        taken, self.orders = self.orders, Orders()
        return taken

    def _has_room(self, size: int, reader: str) -> bool:
        """Whether there is room for `size` more bytes, after what nobody reads was evicted."""
        if size > self.capacity:
            raise SqueezedError(
                f"the context takes {size / 1e9:.3f} GB on a rank, and context_memory is "
                f"{self.capacity / 1e9:.3f} GB; give it more, or use more ranks"
            )
        unread = self._enough(self._unread(), size)
        if unread is None:
            self.waiting_for_room[reader] = set(self._enough(list(self.held), size) or ())
            return False
        for key in unread:
            self._evict(key)
        self.waiting_for_room.pop(reader, None)
        return True

    def _enough(self, keys: list[str], size: int) -> list[str] | None:
        """The first of `keys` that make room together, or `None` if all do not."""
        room, going = self.capacity - self.used, []
        for key in keys:
            if room >= size:
                break
            going.append(key)
            room += self.held[key].bytes
        return going if room >= size else None

    def _unread(self) -> list[str]:
        """Contexts that may go, the least recently used first."""
        return [key for key, one in self.held.items() if one.state == READY and not one.readers]

    def _must_go(self, key: str) -> bool:
        return any(key in going for going in self.waiting_for_room.values())

    def _evict(self, key: str) -> None:
        del self.held[key]
        self.orders.evict.append(key)
