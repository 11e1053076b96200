"""What a compiled training program takes, and what would take less, in words and as a picture."""

import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence

from tvq_t5x.common import plots, words
from tvq_t5x.network.config import Reduction, Remat, Sublayer
from tvq_t5x.planning.estimate import Estimate, Speed
from tvq_t5x.planning.work import Work
from tvq_t5x.training.partitioning import DATA, MODEL


def tables(estimates: Mapping[str, Estimate]) -> str:
  """Markdown: what programs take, where their cycles go, and what is assumed.

  Args:
    estimates: by what the columns are called; a single one needs no name. All are for the same
      topology.
  """
  first = next(iter(estimates.values()))
  names = list(estimates) if len(estimates) > 1 else ['']
  rows = [dict(_rows(x)) for x in estimates.values()]
  texts = [_table([first.topology, *names], rows)]
  parts = [_part_rows(x.work) for x in estimates.values()]
  if any(parts):
    texts += [_table([f'where the cycles of a {first.chip.device} go, millions', *names], parts)]
  if any(x.speed for x in estimates.values()):
    texts += [_assumptions(first)]
  return '\n\n'.join(texts)


def _table(header: Sequence[str], columns: Sequence[Mapping[str, str]]) -> str:
  """Columns beside each other; a row that the first ones lack comes where its own column has it."""
  names: list[str] = []
  for column in columns:
    place = 0
    for name in column:
      if name not in names:
        names.insert(place, name)
      place = names.index(name) + 1
  lines = [header, ['---', *['---:'] * len(columns)]]
  lines += [[name, *(column.get(name, '') for column in columns)] for name in names]
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines).replace('|  |', '| |')


def _rows(x: Estimate) -> Iterator[tuple[str, str]]:
  program, memory, chip = x.program, x.memory, x.chip
  devices = program.partitioner.mesh.devices
  kind = f'{devices.flat[0].device_kind} {chip.device}s'
  yield 'devices', f'{devices.size} ({kind}), {program.partitioner.axes_in_words()}'
  if flags := os.environ.get('LIBTPU_INIT_ARGS'):  # The compiler obeys them.
    yield 'LIBTPU_INIT_ARGS', f'`{flags}`'
  yield 'parameters', f'{x.state.num_parameters:,}'
  yield (
    'a batch',
    f'{program.batch_size} sequences of {program.length:,} tokens, '
    f'{_count(program.num_updates, "update")} of '
    f'{_count(program.num_microbatches, "microbatch")}',
  )
  yield f'memory of a {chip.device}', f'{words.size(chip.hbm_bytes)} for programs'
  yield 'arguments', words.size(memory.arguments)
  yield 'temporaries', words.size(memory.temporaries)
  yield 'program and other results', words.size(memory.code + memory.results)
  yield 'headroom', _headroom(x)
  if x.work is not None:
    yield from _work_rows(x, x.work)
  if x.speed is not None:
    yield from _speed_rows(x, x.speed)


def _work_rows(x: Estimate, work: Work) -> Iterator[tuple[str, str]]:
  each = f'of a {x.chip.device} for a batch'
  needed = x.model_flops / x.program.partitioner.mesh.size
  yield f'FLOPs {each}', f'{_short(work.flops)}, the model {_short(needed)}'
  yield f'bytes moved {each}', words.size(work.num_bytes)
  for (kind, axes), found in work.traffic.items():
    over = f' over {axes}' if axes else ''
    yield (
      f'{kind}{over} {each}',
      f'{words.size(found.num_bytes)} in {found.count:,}, {found.seconds:.3g} s',
    )
  if work.unknown_loops:
    yield 'loops of unknown length, counted once', f'{work.unknown_loops}'


def _speed_rows(x: Estimate, speed: Speed) -> Iterator[tuple[str, str]]:
  assert x.work is not None
  yield (
    "the compiler's estimate for a batch",
    f'{x.work.cycles / 1e6:,.0f} M cycles, {speed.estimated:.3g} s',
  )
  yield (
    'what it has no estimate for',
    f'{words.size(x.work.bytes_without_estimate)} moved, {speed.without_estimate:.3g} s',
  )
  yield 'collectives', f'{speed.exchange:.3g} s, asynchronous {speed.asynchronous:.3g} s of them'
  bounds = speed.longest, speed.shortest
  yield 'so, estimated, tokens/s', _range(f'{x.program.num_tokens / s:,.0f}' for s in bounds)
  peak = x.chip.flops_per_s
  needed = x.model_flops / x.program.partitioner.mesh.size
  shares = (_range(f'{flops / peak / s:.0%}' for s in bounds) for flops in (needed, x.work.flops))
  yield (
    f'utilization of the peak, {_short(peak)}FLOP/s',
    "{}, by the program's FLOPs {}".format(*shares),
  )


def _part_rows(work: Work | None) -> dict[str, str]:
  if work is None or not work.cycles:
    return {}
  return {
    name: f'{cycles / 1e6:,.0f} ({cycles / work.cycles:.0%})'
    for name, cycles in work.parts.items()
    if cycles >= work.cycles / 1000
  }


def _assumptions(x: Estimate) -> str:
  network, chip = x.network, x.chip
  sizes = (
    f'{size}{" in a ring" if ring else ""}'
    for size, ring in zip(network.shape, network.wraps, strict=True)
  )
  return (
    f'Assumed: chips {" x ".join(sizes)}, links of {network.link_bytes_per_s / 1e9:.3g} GB/s each '
    f'way, all of those of its axes for a collective, at least {network.hop_seconds * 1e6:.3g} us '
    f'a chip on its way; what has no estimate moves at {chip.hbm_bytes_per_s / 1e9:.4g} GB/s, and '
    'copies made meanwhile take no time. The lower of two figures is for collectives that nothing '
    'hides, the higher one for asynchronous ones that are hidden as far as they can be. Nothing '
    'was measured.'
  )


def draw(path: str, estimates: Mapping[str, Estimate]) -> None:
  """Draws where the cycles go, a bar for each part of the model, and a PDF file beside the PNG."""
  works = {name: x.work for name, x in estimates.items() if x.work is not None}
  names = list(dict.fromkeys(part for work in works.values() for part in work.parts))
  caption = 'Compiled for TPUs that are not there; nothing was measured'
  figure = plots.figure(8, 1.7 + 0.25 * len(names) * len(works), caption)
  axes = figure.subplots()
  height = 0.8 / max(1, len(works))
  for i, ((name, work), color) in enumerate(
    zip(works.items(), plots.colors(list(works)).values(), strict=True)
  ):
    places = [row + i * height for row in range(len(names))]
    values = [work.parts.get(part, 0) / 1e6 for part in names]
    label = f'{name}: {work.cycles / 1e6:,.0f}'
    bars = axes.barh(places, values, height, label=label, color=color)
    axes.bar_label(bars, fmt='{:,.0f}', padding=2, fontsize=8)
  axes.set_yticks([row + 0.4 - height / 2 for row in range(len(names))], names)
  axes.invert_yaxis()
  axes.set(xlabel="millions of cycles for a batch, the compiler's estimate")
  axes.margins(x=0.1)
  axes.legend(fontsize=8, loc='lower right')
  plots.save_both(figure, pathlib.Path(path))


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
    name, what = 'NUM_PARTITIONS', 'the model'
    if program.partitioner.sequence_partitions > 1:
      name, what = 'SEQUENCE_PARTITIONS', 'a sequence'
    lines.append(f'--gin.{name}={partitions}: less of {what} on each {x.chip.device}')
  lines.append('a topology with more devices or more memory')
  need = words.size(x.memory.total)
  need = need if x.work is not None else f'at least {need}'
  what = '\n'.join(f'  {line}' for line in lines)
  return f'It does not fit: {need} on each {x.chip.device}. What takes less:\n{what}'


def _headroom(x: Estimate) -> str:
  left = x.chip.hbm_bytes - x.memory.total
  return words.size(left) if left >= 0 else f'none, {words.size(-left)} too much'


def _range(texts: Iterator[str]) -> str:
  """Two bounds, or one if they are the same."""
  return ' to '.join(dict.fromkeys(texts))


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
