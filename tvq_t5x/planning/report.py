"""What a compiled training program takes, and what would take less, in words."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import jax

from tvq_t5x.common import words
from tvq_t5x.network.config import Reduction, Remat, Sublayer
from tvq_t5x.planning import hlo
from tvq_t5x.planning.program import Program
from tvq_t5x.planning.topologies import Chip
from tvq_t5x.training import placement
from tvq_t5x.training.partitioning import DATA, MODEL
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
class Estimate:
  """What the compiler says of a training program.

  Attributes:
    program: what was compiled.
    topology: for which devices, such as 'v3:8x8'.
    chip: facts about them.
    state: what parameters and optimizer state take.
    memory: of a device.
    work: of a device, for a batch; None for a program that the compiler refused because of its
      temporaries.
  """

  program: Program
  topology: str
  chip: Chip
  state: StateInfo
  memory: Memory
  work: hlo.Work | None

  @property
  def fits(self) -> bool:
    """Whether the program can run on these devices."""
    return self.work is not None and self.memory.total <= self.chip.hbm_bytes


def estimate(
  program: Program, topology: str, chip: Chip, compiled: jax.stages.Compiled
) -> Estimate:
  """The estimate of a program that was compiled."""
  stats: Any = compiled.memory_analysis()
  memory = Memory(
    arguments=stats.argument_size_in_bytes,
    results=stats.output_size_in_bytes - stats.alias_size_in_bytes,
    temporaries=stats.temp_size_in_bytes,
    code=stats.generated_code_size_in_bytes,
  )
  state = placement.describe(program.partitioner, program.model, program.batch_size)
  return Estimate(program, topology, chip, state, memory, hlo.work_of(hlo.module_of(compiled)))


def refused(program: Program, topology: str, chip: Chip, error: Exception) -> Estimate:
  """The estimate of a program whose temporaries the compiler found too large.

  Raises:
    Exception: `error`, if it says something else.
  """
  found = re.search(r'temporaries \(([\d.]+)([KMG])\) exceeds available HBM', str(error))
  if not found:
    raise error
  temporaries = float(found[1]) * 2 ** {'K': 10, 'M': 20, 'G': 30}[found[2]]
  state = placement.describe(program.partitioner, program.model, program.batch_size)
  memory = Memory(state.num_bytes_per_device, 0, int(temporaries), 0)
  return Estimate(program, topology, chip, state, memory, None)


def table(x: Estimate) -> str:
  """A Markdown table."""
  program, memory, chip = x.program, x.memory, x.chip
  mesh = program.partitioner.mesh
  kind = mesh.devices.flat[0].device_kind
  rows = [
    (
      'devices',
      f'{mesh.size} ({kind} {chip.device}s), data {mesh.shape[DATA]} x model {mesh.shape[MODEL]}',
    ),
    ('parameters', f'{x.state.num_parameters:,}'),
    (
      'a batch',
      f'{program.batch_size} sequences of {program.length:,} tokens, '
      f'{_count(program.num_updates, "update")} of '
      f'{_count(program.num_microbatches, "microbatch")}',
    ),
    (f'memory of a {chip.device}', f'{words.size(chip.hbm_bytes)} for programs'),
    ('arguments', words.size(memory.arguments)),
    ('temporaries', words.size(memory.temporaries)),
    ('program and other results', words.size(memory.code + memory.results)),
    ('headroom', _headroom(x)),
  ]
  if x.work is not None:
    rows += _work_rows(x, x.work)
  lines = [f'| {x.topology} | |', '| --- | ---: |', *(f'| {a} | {b} |' for a, b in rows)]
  return '\n'.join(lines)


def _work_rows(x: Estimate, work: hlo.Work) -> Iterator[tuple[str, str]]:
  each = f'of a {x.chip.device} for a batch'
  yield f'FLOPs {each}', _short(work.flops)
  yield f'bytes moved {each}', words.size(work.num_bytes)
  for kind, found in work.collectives.items():
    yield f'{kind} {each}', f'{words.size(found.num_bytes)} in {found.count:,}'
  if work.unknown_loops:
    yield 'loops of unknown length, counted once', f'{work.unknown_loops}'
  if work.cycles:
    seconds = work.cycles / x.chip.hertz
    yield (
      "compiler's estimate for a batch, collectives not counted",
      f'{work.cycles / 1e6:,.0f} M cycles, {seconds:.3g} s',
    )
    yield 'so, estimated, tokens/s', f'{x.program.num_tokens / seconds:,.0f}'


def advice(x: Estimate) -> str:
  """Flags that make a program take less memory; for one that does not fit."""
  program, config = x.program, x.program.model.config
  mesh = program.partitioner.mesh
  lines = []
  rows = program.batch_size // mesh.shape[DATA]
  more = [n for n in range(program.num_microbatches + 1, rows + 1) if rows % n == 0]
  if more:
    lines.append(
      f'--gin.NUM_MICROBATCHES={more[0]}: {_count(rows // more[0], "sequence")} at a time on each '
      'of the data axis'
    )
  if config.remat != Remat.LAYER:
    lines.append(
      '--gin.config.TransformerConfig.remat=\\"layer\\": keeps less for the backward pass'
    )
  if Sublayer.VQ in config.layer_sublayers and config.reduction != Reduction.SERIAL:
    lines.append(
      '--gin.config.TransformerConfig.reduction=\\"serial\\": one block of a sequence at a time'
    )
  partitions = 2 * mesh.shape[MODEL]
  if mesh.size % partitions == 0:
    lines.append(f'--gin.NUM_PARTITIONS={partitions}: less of the model on each {x.chip.device}')
  lines.append('a topology with more devices or more memory')
  need = words.size(x.memory.total)
  need = need if x.work is not None else f'at least {need}'
  what = '\n'.join(f'  {line}' for line in lines)
  return f'It does not fit: {need} on each {x.chip.device}. What takes less:\n{what}'


def _headroom(x: Estimate) -> str:
  left = x.chip.hbm_bytes - x.memory.total
  return words.size(left) if left >= 0 else f'none, {words.size(-left)} too much'


def _short(value: float) -> str:
  """A number with an SI prefix, such as '84.6 T'."""
  for prefix in ('', ' k', ' M', ' G', ' T'):
    if value < 1000:
      return f'{value:.3g}{prefix}'
    value /= 1000
  return f'{value:.3g} P'


def _count(n: int, what: str) -> str:
  plural = what if n == 1 else what + ('es' if what.endswith('ch') else 's')
  return f'{n} {plural}'
