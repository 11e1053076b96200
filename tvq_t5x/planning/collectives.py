"""What devices exchange in a compiled program, over which axes of the mesh, and for how long."""

# Protobuf makes the classes of its messages as they are imported.
# pyright: reportAttributeAccessIssue=false

import collections
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tvq_t5x.planning import hlo, operations
from tvq_t5x.planning.hlo import Execution, Instruction, Module
from tvq_t5x.planning.network import Groups, Loads, Network

_PERMUTE = 'collective-permute'
KINDS = (
  'all-gather',
  'all-reduce',
  'all-to-all',
  'collective-broadcast',
  _PERMUTE,
  'ragged-all-to-all',
  'reduce-scatter',
)


class Traffic(NamedTuple):
  """All collectives of one kind over the same axes of the mesh."""

  count: int  # Executions.
  num_bytes: int  # Of the whole array on each device: gathered, or before it is scattered.
  seconds: float
  asynchronous_seconds: float  # Those of them in which other instructions can run.


class Layout(NamedTuple):
  """The mesh of a program's devices, and where they are."""

  axes: Mapping[str, int]  # Sizes by name; the last one counts fastest.
  network: Network


def traffic_of(
  executions: Iterable[Execution], module: Module, layout: Layout
) -> dict[tuple[str, str], Traffic]:
  """Adds up the collectives by kind and axes of the mesh, such as ('all-gather', 'data')."""
  found = collections.defaultdict(lambda: Traffic(0, 0, 0.0, 0.0))
  for run in executions:
    permutes = []
    for x in run.computation.instructions:
      kind = kind_of(x)
      if kind is None or hlo.goes_on(x):
        continue
      size = num_bytes(x, module)
      if kind == _PERMUTE:
        permutes.append((x, size))
        continue
      groups = groups_of(x, math.prod(layout.axes.values()))
      seconds = _seconds(kind, groups, size, layout.network)
      _add(found, run, x, kind, _axes(groups, layout), size, seconds)
    for x, size, seconds in _permute_seconds(permutes, layout.network):
      pairs = [(p.source, p.target) for p in x.source_target_pairs]
      _add(found, run, x, _PERMUTE, _axes(pairs, layout), size, seconds)
  return dict(sorted(found.items()))


def _add(found, run: Execution, x: Instruction, kind: str, axes: str, size: int, seconds: float):
  meanwhile = run.asynchronous or x.opcode.endswith('-start')
  old, times = found[kind, axes], run.times
  found[kind, axes] = Traffic(
    old.count + times,
    old.num_bytes + times * size,
    old.seconds + times * seconds,
    old.asynchronous_seconds + times * seconds * meanwhile,
  )


def kind_of(instruction: Instruction) -> str | None:
  """Which collective it is or starts, if any."""
  kind = instruction.opcode.removesuffix('-start')
  return kind if kind in KINDS else None


def num_bytes(instruction: Instruction, module: Module) -> int:
  """Bytes of the whole array on each device."""
  operands = operations.sizes_of(module.operands(instruction))
  return max(operands, operations.result_bytes(instruction, module))


def _seconds(kind: str, groups: Groups, size: int, network: Network) -> float:
  if kind == 'all-reduce':
    return 2 * network.gather_seconds(groups, size)
  if kind in ('all-to-all', 'ragged-all-to-all'):
    return network.exchange_seconds(groups, size)
  return network.gather_seconds(groups, size)


def _permute_seconds(
  permutes: Sequence[tuple[Instruction, int]], network: Network
) -> list[tuple[Instruction, int, float]]:
  """The time of the permutations of a computation, such as a loop's body.

  Those that use other links, as in the other direction of a ring, go at the same time: together
  they take as long as the busiest link, each its share of that, and at least that of its way.
  """
  loads, alone, ways = Loads(), [], []
  for x, size in permutes:
    routes = [network.route(p.source, p.target) for p in x.source_target_pairs]
    links = Loads(link for route in routes for link in route)
    for link, number in links.items():
      loads[link] += number * size
    alone.append(max(links.values(), default=0) * size)
    ways.append(max(map(len, routes)) * network.hop_seconds)
  together = max(loads.values(), default=0) / network.link_bytes_per_s / (sum(alone) or 1)
  return [
    (x, size, max(share * together, way))
    for (x, size), share, way in zip(permutes, alone, ways, strict=True)
  ]


def _axes(groups: Groups, layout: Layout) -> str:
  """Axes of the mesh whose devices exchange something, such as 'data' or 'data x model'."""
  sizes = tuple(layout.axes.values())
  varying = [False] * len(sizes)
  for group in groups:
    places = np.stack(np.unravel_index(np.array(group), sizes))
    varying = [a or len(set(b)) > 1 for a, b in zip(varying, places.tolist(), strict=True)]
  return ' x '.join(name for name, moves in zip(layout.axes, varying, strict=True) if moves)


def groups_of(instruction: Instruction, num_devices: int) -> list[list[int]]:
  """The devices of each group, in whichever of XLA's notations; all of them if there is none."""
  devices = instruction.collective_device_list
  lists = devices.replica_groups or instruction.replica_groups
  if lists:
    return [list(group.replica_ids) for group in lists]
  for iota in (instruction.iota_collective_device_list, devices.iota_replica_group_list):
    if iota.num_replica_groups:
      ids = np.arange(math.prod(iota.iota_reshape_dims)).reshape(iota.iota_reshape_dims)
      ids = ids.transpose(list(iota.iota_transpose_perm) or None)
      return ids.reshape(iota.num_replica_groups, iota.num_devices_per_group).tolist()
  named = instruction.mesh_axes_replica_group_list
  if named.axes:
    return _groups_along(named)
  return [list(range(num_devices))]


def _groups_along(named) -> list[list[int]]:
  """Groups along axes of a mesh, or along parts of an axis: the major ones, or those between."""
  shape, along = [], []
  for i, axis in enumerate(named.mesh.axes):
    refs = [x for x in named.axes if x.mesh_axis_index == i]
    spans = [
      (x.sub_axis_info.pre_size, x.sub_axis_info.pre_size * x.sub_axis_info.size)
      if x.HasField('sub_axis_info')
      else (1, axis.size)
      for x in refs
    ]
    ends = sorted({1, axis.size, *(end for span in spans for end in span)})
    for start, end in zip(ends[:-1], ends[1:], strict=True):
      shape.append(end // start)
      along.append(any(a <= start and end <= b for a, b in spans))
  ids = np.array(named.mesh.device_ids or range(math.prod(shape))).reshape(shape)
  last = [i for i, inside in enumerate(along) if inside]
  first = [i for i, inside in enumerate(along) if not inside]
  size = math.prod(shape[i] for i in last)
  return ids.transpose(first + last).reshape(-1, size).tolist()
