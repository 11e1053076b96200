"""What one device does in one execution of a compiled program.

XLA's own cost analysis counts the body of a loop once. Here it counts as often as it runs, and so
does everything that it calls.
"""

import collections
import dataclasses
from collections.abc import Collection, Mapping

from tvq_t5x.planning import collectives, hlo, operations, parts
from tvq_t5x.planning.collectives import Layout, Traffic


@dataclasses.dataclass(frozen=True)
class Work:
  """What one device does.

  Attributes:
    flops: of matrix products and convolutions, a multiplication and an addition each.
    num_bytes: that its instructions read and write, in any memory.
    cycles: the compiler's own estimate; 0 where the compiler writes none (CPU).
    bytes_without_estimate: of `num_bytes`, those of instructions that have no cycles; without
      collectives, and without copies that are made while other instructions run.
    parts: the cycles by the parts of the model, see `parts`, the most first.
    traffic: between devices, by kind and axes of the mesh.
    unknown_loops: loops whose length the program does not say; they count once.
  """

  flops: int
  num_bytes: int
  cycles: int
  bytes_without_estimate: int
  parts: Mapping[str, int]
  traffic: Mapping[tuple[str, str], Traffic]
  unknown_loops: int


def work_of(program: hlo.ProgramProto, layout: Layout, sublayers: Collection[str] = ()) -> Work:
  """Adds up what a program's instructions do.

  Args:
    program: as it was compiled.
    layout: of its devices.
    sublayers: names of a layer's sublayers, for the parts.
  """
  module = hlo.Module(program)
  executions = list(module.executions())
  flops = num_bytes = unknown_loops = without = 0
  by_part = collections.Counter()
  for run in executions:
    for x in run.computation.instructions:
      flops += run.times * operations.flops(x, module)
      if x.opcode == 'while':
        unknown_loops += hlo.trip_count(x, module) is None
      if run.fused:
        continue
      moved, cycles = operations.num_bytes(x, module), operations.cycles(x)
      num_bytes += run.times * moved
      if cycles:
        by_part[_part(x, module, sublayers)] += run.times * cycles
      elif not (run.asynchronous or module.runs_meanwhile(x) or collectives.kind_of(x)):
        without += run.times * moved
  return Work(
    flops=flops,
    num_bytes=num_bytes,
    cycles=by_part.total(),
    bytes_without_estimate=without,
    parts=dict(by_part.most_common()),
    traffic=collectives.traffic_of(executions, module, layout),
    unknown_loops=unknown_loops,
  )


def _part(x: hlo.Instruction, module: hlo.Module, sublayers: Collection[str]) -> str:
  if operations.moves_only(x, module):
    return parts.COPIES
  return parts.part_of(operations.op_name(x, module), sublayers)
