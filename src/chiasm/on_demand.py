"""What there is of each of many cases, on the disk until it is asked for: memory does not grow with the cases."""

from __future__ import annotations

import pickle
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Generic, TypeVar, overload

from chiasm.storage import writing

Found = TypeVar("Found")
Part = TypeVar("Part")
Item = TypeVar("Item")


class Scratch(Mapping[str, Found], Generic[Found]):
    """A mapping whose values lie in a file without a name: memory does not grow with them, and nothing is left behind.

    Each look-up reads the value again, so it is a copy, and changes of it are lost.
    """

    def __init__(self, folder: Path) -> None:
        """Open the file.

        Args:
            folder: On whose disk it lies; it must exist.

        Raises:
            ChiasmError: If the folder cannot be written.
        """
        self._folder = folder
        self._places: dict[str, tuple[int, int]] = {}
        self._end = 0
        with writing(folder):
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  open as long as the mapping is used
        weakref.finalize(self, self._file.close)

    def keep(self, name: str, value: Found) -> None:
        """Write a value, which `pickle` can hold.

        Raises:
            ChiasmError: If the disk is full.
        """
        content = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
        with writing(self._folder):
            self._file.seek(self._end)
            self._file.write(content)
            self._file.flush()
        self._places[name] = self._end, len(content)
        self._end += len(content)

    def __getitem__(self, name: str) -> Found:
        start, size = self._places[name]
        self._file.seek(start)
        value: Found = pickle.loads(self._file.read(size))  # written by this process, into a file that no other opens
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class PartOf(Mapping[str, Part], Generic[Found, Part]):
    """One part of each value of a mapping, taken where it is asked for."""

    def __init__(self, whole: Mapping[str, Found], part: Callable[[Found], Part]) -> None:
        """Name the part.

        Args:
            whole: Any mapping.
            part: Takes it from a value.
        """
        self._whole, self._part = whole, part

    def __getitem__(self, name: str) -> Part:
        return self._part(self._whole[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._whole)

    def __len__(self) -> int:
        return len(self._whole)


class OnDemand(Sequence[Item], Generic[Item]):
    """A sequence whose items are opened where they are looked at; the latest few stay open."""

    def __init__(self, openers: Mapping[str, Callable[[], Item]], most: int) -> None:
        """Open nothing yet.

        Args:
            openers: Name of each item to what opens it, in their order.
            most: How many stay open.
        """
        kept = dict(openers)
        self._openers, self._most = kept, most
        self.names = tuple(openers)
        self._opened = lru_cache(maxsize=most)(lambda name: kept[name]())  # without self, so that files close with it

    def __reduce__(self) -> tuple[type[OnDemand[Item]], tuple[Mapping[str, Callable[[], Item]], int]]:
        """Pickle what opens the items, and none of those that are open."""
        return OnDemand, (self._openers, self._most)

    def only(self, names: Iterable[str]) -> OnDemand[Item]:
        """Return the items of these names, in their order; names that are not there are passed over."""
        return OnDemand({name: self._openers[name] for name in names if name in self._openers}, self._most)

    @overload
    def __getitem__(self, place: int) -> Item: ...

    @overload
    def __getitem__(self, place: slice) -> OnDemand[Item]: ...

    def __getitem__(self, place: int | slice) -> Item | OnDemand[Item]:
        if isinstance(place, slice):
            return self.only(self.names[place])
        return self._opened(self.names[place])

    def __len__(self) -> int:
        return len(self.names)
