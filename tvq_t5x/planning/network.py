"""The links between the chips of a TPU, and how long what goes over them takes."""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

Chip = tuple[int, ...]  # Its place along each axis of the network.
Groups = Sequence[Sequence[int]]  # Devices that exchange something, by their place in the mesh.
Link = tuple[Chip, int, int]  # From a chip along an axis, in the direction +1 or -1.
Loads = collections.Counter[Link]


@dataclasses.dataclass(frozen=True)
class Network:
  """Chips in a grid, each with a link to its neighbors, and rings along the axes that wrap around.

  What is exchanged goes over all the links that the axes of a group have, in both directions, at
  their full bandwidth, and takes no less than `hop_seconds` for each chip on its way. Devices of
  one chip exchange for nothing, and what they have in common is sent to a chip once.

  Attributes:
    shape: chips along each axis.
    wraps: whether the last chip of an axis has a link to the first.
    places: the chip of each device, in the order of the mesh.
    link_bytes_per_s: of a link, in each direction.
    hop_seconds: from a chip to its neighbor.
  """

  shape: tuple[int, ...]
  wraps: tuple[bool, ...]
  places: tuple[Chip, ...]
  link_bytes_per_s: float
  hop_seconds: float = 1e-6

  def gather_seconds(self, groups: Groups, num_bytes: int) -> float:
    """Until every chip of a group has the whole of an array that is shared out among them.

    That is an all-gather, and the other way round a reduce-scatter; an all-reduce is both.
    """

    def seconds(box: _Box) -> float:
      links = sum(2 if ring else 1 for _, ring in box.axes)  # Of a chip in the corner.
      sent = num_bytes * (box.chips - 1) / box.chips
      return max(sent / (links * self.link_bytes_per_s), self._hops(box) * self.hop_seconds)

    return self._longest(groups, seconds)

  def exchange_seconds(self, groups: Groups, num_bytes: int) -> float:
    """Until every device has sent another part of its array to each of its group (all-to-all)."""

    def seconds(box: _Box) -> float:
      # Half of an array crosses the middle of an axis, in either direction, from each half.
      per_link = max(size / (4 * (2 if ring else 1)) for size, ring in box.axes)
      sent = num_bytes * box.devices / box.chips * per_link
      return max(sent / self.link_bytes_per_s, self._hops(box) * self.hop_seconds)

    return self._longest(groups, seconds)

  def route(self, source: int, target: int) -> list[Link]:
    """The links from one device to another: axis after axis, the shorter way around a ring."""
    links, at, end = [], list(self.places[source]), self.places[target]
    for axis, size in enumerate(self.shape):
      distance = end[axis] - at[axis]
      if self.wraps[axis] and abs(distance) > size // 2:
        distance -= size if distance > 0 else -size
      step = 1 if distance > 0 else -1
      for _ in range(abs(distance)):
        links.append((tuple(at), axis, step))
        at[axis] = (at[axis] + step) % size
    return links

  def _hops(self, box: '_Box') -> int:
    return sum(size // 2 if ring else size - 1 for size, ring in box.axes)

  def _longest(self, groups: Groups, seconds: Callable[['_Box'], float]) -> float:
    """Of groups that exchange at the same time, and share the links where their boxes overlap."""
    boxes = [self._box(group) for group in groups]
    chips = {self.places[device] for group in groups for device in group}
    sharing = sum(box.volume for box in boxes) / len(chips)
    return sharing * max((seconds(box) for box in boxes if box.chips > 1), default=0.0)

  def _box(self, group: Sequence[int]) -> '_Box':
    chips = {self.places[device] for device in group}
    axes, volume = [], 1
    for axis, size in enumerate(self.shape):
      along = {chip[axis] for chip in chips}
      volume *= max(along) - min(along) + 1
      if len(along) > 1:
        axes.append((len(along), self.wraps[axis] and len(along) == size))
    return _Box(tuple(axes), len(group), len(chips), volume)


class _Box(NamedTuple):
  """The smallest box around the chips of a group."""

  axes: tuple[tuple[int, bool], ...]  # Of each that it extends along: chips, whether it is a ring.
  devices: int
  chips: int  # Of the group.
  volume: int  # All chips in the box.
