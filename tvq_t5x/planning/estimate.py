"""What the compiler says of a training program, and what follows for its speed."""

import dataclasses
import re
from typing import Any

import jax

from tvq_t5x.network import sublayers
from tvq_t5x.planning import hlo, topologies
from tvq_t5x.planning.collectives import Layout
from tvq_t5x.planning.model_flops import model_flops
from tvq_t5x.planning.network import Network
from tvq_t5x.planning.program import Program
from tvq_t5x.planning.topologies import Chip
from tvq_t5x.planning.work import Work, work_of
from tvq_t5x.training import placement
from tvq_t5x.training.placement import StateInfo


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of one device's memory."""

  arguments: int  # Parameters, optimizer state, batch.
  results: int  # Those that take no argument's place.
  temporaries: int
  code: int

  @property
  def total(self) -> int:
    """Bytes that the program needs."""
    return self.arguments + self.results + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Speed:
  """Seconds for a batch.

  Attributes:
    estimated: of the cycles that the compiler estimates.
    without_estimate: of instructions that it has no cycles for, at the memory's full bandwidth.
    exchange: of collectives.
    asynchronous: of these, of those that something else may hide.
  """

  estimated: float
  without_estimate: float
  exchange: float
  asynchronous: float

  @property
  def longest(self) -> float:
    """If no collective runs while something else does."""
    return self.estimated + self.without_estimate + self.exchange

  @property
  def shortest(self) -> float:
    """If all do that the compiler made asynchronous."""
    alone = self.longest - self.asynchronous
    return alone + max(0.0, self.asynchronous - self.estimated - self.without_estimate)


@dataclasses.dataclass(frozen=True)
class Estimate:
  """What the compiler says of a training program.

  Attributes:
    program: what was compiled.
    topology: for which devices, such as 'v3:8x8'.
    chip: facts about them.
    network: links between them.
    state: what parameters and optimizer state take.
    memory: of a device.
    model_flops: that the model takes for a batch, of all devices; see `model_flops`.
    work: of a device, for a batch; None for a program that the compiler refused because of its
      temporaries.
  """

  program: Program
  topology: str
  chip: Chip
  network: Network
  state: StateInfo
  memory: Memory
  model_flops: int
  work: Work | None

  @property
  def fits(self) -> bool:
    """Whether the program can run on these devices."""
    return self.work is not None and self.memory.total <= self.chip.hbm_bytes

  @property
  def speed(self) -> Speed | None:
    """Where the compiler estimates cycles."""
    if self.work is None or not self.work.cycles:
      return None
    traffic = self.work.traffic.values()
    return Speed(
      estimated=self.work.cycles / self.chip.hertz,
      without_estimate=self.work.bytes_without_estimate / self.chip.hbm_bytes_per_s,
      exchange=sum(x.seconds for x in traffic),
      asynchronous=sum(x.asynchronous_seconds for x in traffic),
    )


def estimate(
  program: Program, topology: str, network: Network, compiled: jax.stages.Compiled
) -> Estimate:
  """The estimate of a program that was compiled.

  Args:
    program: what it is.
    topology: such as 'v3:8x8'.
    network: of the topology; the devices are those of the program's mesh.
    compiled: the program.
  """
  stats: Any = compiled.memory_analysis()
  memory = Memory(
    arguments=stats.argument_size_in_bytes,
    results=stats.output_size_in_bytes - stats.alias_size_in_bytes,
    temporaries=stats.temp_size_in_bytes,
    code=stats.generated_code_size_in_bytes,
  )
  names = [x.name for x in sublayers.of_layer(program.model.config)]
  layout = Layout(program.partitioner.mesh.shape, network)
  work = work_of(hlo.module_of(compiled), layout, names)
  return _estimate(program, topology, network, memory, work)


def refused(program: Program, topology: str, network: Network, error: Exception) -> Estimate:
  """The estimate of a program whose temporaries the compiler found too large.

  Raises:
    Exception: `error`, if it says something else.
  """
  found = re.search(r'temporaries \(([\d.]+)([KMG])\) exceeds available HBM', str(error))
  if not found:
    raise error
  temporaries = float(found[1]) * 2 ** {'K': 10, 'M': 20, 'G': 30}[found[2]]
  return _estimate(program, topology, network, Memory(0, 0, int(temporaries), 0), None)


def _estimate(
  program: Program, topology: str, network: Network, memory: Memory, work: Work | None
) -> Estimate:
  state = placement.describe(program.partitioner, program.model, program.batch_size)
  if work is None:
    memory = dataclasses.replace(memory, arguments=state.num_bytes_per_device)
  return Estimate(
    program=program,
    topology=topology,
    chip=topologies.chip_of(topology),
    network=network,
    state=state,
    memory=memory,
    model_flops=model_flops(program),
    work=work,
  )
