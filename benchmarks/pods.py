"""Plans the runs of docs/pods.md anew, and writes what they say into it and into gin/mesh/.

  python benchmarks/pods.py

compiles every program for its TPUs, each in a process of its own, in minutes each: every command of
the page, whose output follows it there, and the plans of MESHES. Outputs are kept in --out_dir, so
a run that is interrupted goes on where it was; an empty folder begins anew.

  python benchmarks/pods.py --search=v4_64

tries other meshes for the first plan of gin/mesh/v4_64.gin, and prints them, the fastest first.
"""

import hashlib
import itertools
import os
import pathlib
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from absl import app, flags

_OUT = flags.DEFINE_string('out_dir', 'runs/pods', 'Where the outputs of `plan` are kept.')
_SEARCH = flags.DEFINE_string('search', None, 'A mesh of MESHES to try others for.')

_ROOT = pathlib.Path(__file__).parents[1]
_PAGE = _ROOT / 'docs' / 'pods.md'
_COMMAND = 'python -m tvq_t5x.plan'
_HEADER = '| | `--topology` | plan | memory | estimated tokens/s | utilization |'


class Plan(NamedTuple):
  """A run on a mesh."""

  mesh: str  # A file of gin/mesh/.
  topology: str
  run: str  # A file of gin/.
  bindings: tuple[str, ...] = ()  # NAME=VALUE
  flags: str = ''  # LIBTPU_INIT_ARGS in the environment.

  @property
  def args(self) -> list[str]:
    """Of `plan`."""
    files = f'--gin_file=gin/{self.run}.gin', f'--gin_file=gin/mesh/{self.mesh}.gin'
    return [*files, f'--topology={self.topology}', *(f'--gin.{x}' for x in self.bindings)]


# For a v5e only: docs/pods.md says what they do.
_ASYNCHRONOUS = (
  '--xla_enable_async_all_gather=true --xla_tpu_prefer_async_allgather_to_allreduce=true '
  '--xla_enable_async_all_reduce=true --xla_tpu_enable_async_collective_fusion_fuse_all_reduce=true'
)

MESHES = (
  Plan('one_device', 'v5e:1x1', 'enwik8_base', ('BATCH_SIZE=8',)),
  Plan('v3_8', 'v3:2x2', 'enwik8_base'),
  Plan('v3_8', 'v3:2x2', 'pg19_large', ('BATCH_SIZE=32', 'NUM_MICROBATCHES=4')),
  Plan('v3_32', 'v3:4x4', 'pg19_large'),
  Plan('v3_128', 'v3:8x8', 'pg19_large'),
  Plan('v4_64', 'v4:4x4x2', 'pg19_large'),
  Plan('v5e_64', 'v5e:8x8', 'pg19_large', flags=_ASYNCHRONOUS),
  Plan('v5p_128', 'v5p:4x4x4', 'pg19_large'),
)


class Result(NamedTuple):
  """What a plan said, or what the compiler refused."""

  output: str  # All tables.
  cells: dict[str, str]  # Of the first one, by the names of its rows.

  @property
  def memory(self) -> str:
    """Such as '9.2 GB of 16.6 GB left'."""
    left = self.cells['headroom']
    whole = next(x for name, x in self.cells.items() if name.startswith('memory of a '))
    return left if self.too_large else f'{left} of {whole.removesuffix(" for programs")} left'

  @property
  def too_large(self) -> bool:
    """Whether it does not fit."""
    return self.cells['headroom'].startswith('none')

  @property
  def tokens_per_s(self) -> str:
    """To three digits, as the estimate is not better; such as '290,000 to 322,000'."""
    found = self.cells.get('so, estimated, tokens/s', '')
    values = [float(x.replace(',', '')) for x in found.split(' to ')] if found else []
    return ' to '.join(dict.fromkeys(f'{float(f"{x:.3g}"):,.0f}' for x in values))

  @property
  def utilization(self) -> str:
    """By the FLOPs of the model."""
    names = (name for name in self.cells if name.startswith('utilization'))
    return next((self.cells[name].partition(',')[0] for name in names), '')


def _result(args: Sequence[str], flags: str = '') -> Result:
  """Of `plan` with these arguments and flags of the compiler, kept from before or new.

  Raises:
    SystemExit: if it fails otherwise than by what does not fit.
  """
  name = hashlib.sha256('\0'.join([*args, *flags.split()]).encode()).hexdigest()[:16]
  path = pathlib.Path(_OUT.value) / f'{name}.md'
  if not path.exists():
    print(flags, _COMMAND, shlex.join(args), file=sys.stderr, flush=True)
    command = [sys.executable, *_COMMAND.split()[1:], *args]
    given = os.environ.get('LIBTPU_INIT_ARGS', '')
    env = {**os.environ, 'LIBTPU_INIT_ARGS': f'{given} {flags}'.strip()}
    done = subprocess.run(
      command, cwd=_ROOT, env=env, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode not in (0, 1) or not done.stdout:
      sys.exit(f'`plan` ended with {done.returncode}')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(done.stdout, encoding='utf-8')
  output = path.read_text(encoding='utf-8')
  first = output.partition('\n\n')[0].splitlines()[2:]
  return Result(output, dict(line.strip('| ').split(' | ') for line in first))


def _sections(page: str) -> str:
  """The page, with what its commands print after each of them.

  What follows a command, up to the next heading or paragraph of text, is its output.
  """
  lines, done = page.split('\n'), []
  while lines:
    done.append(lines.pop(0))
    if not done[-1].startswith(f'    {_COMMAND}'):
      continue
    while done[-1].endswith('\\'):
      done.append(lines.pop(0))
    start = max(i for i, line in enumerate(done) if _COMMAND in line)
    if not any(line.startswith('|') for line in lines[:2]):
      continue  # An example.
    command = ' '.join(line.strip().removesuffix('\\') for line in done[start:])
    while lines and (not lines[0] or lines[0].startswith(('|', 'Assumed:'))):
      lines.pop(0)
    tables = _result(shlex.split(command)[3:]).output.rpartition('\n\nAssumed:')[0]
    done += ['', *tables.splitlines(), '']
  return '\n'.join(done)


def _meshes() -> Iterator[str]:
  yield _HEADER
  yield '| --- | --- | --- | --- | ---: | ---: |'
  for plan in MESHES:
    found = _result(plan.args, plan.flags)
    settings = [f'`--gin.{_escaped(x)}`' for x in plan.bindings]
    if plan.flags:
      settings.append('[flags](#flags-of-the-compiler)')
    run = f'`{plan.run}`' + (f' with {" and ".join(settings)}' if settings else '')
    cells = f'`{plan.mesh}`', f'`{plan.topology}`', run, found.memory
    yield f'| {" | ".join(cells)} | {found.tokens_per_s} | {found.utilization} |'


def _escaped(binding: str) -> str:
  """For a shell."""
  return binding.replace('"', '\\"')


def _write_page() -> None:
  page = _sections(_PAGE.read_text(encoding='utf-8'))
  before, _, rest = page.partition('| | `--topology`')
  after = rest.partition('\n\n')[2]
  _PAGE.write_text(before + '\n'.join(_meshes()) + '\n\n' + after, encoding='utf-8')


def _write_headers() -> None:
  """The last comment of a mesh's file: what its plans say."""
  for mesh, plans in itertools.groupby(MESHES, key=lambda plan: plan.mesh):
    said = []
    for plan in plans:
      found = _result(plan.args, plan.flags)
      settings = [f'--gin.{_escaped(x)}' for x in plan.bindings]
      if plan.flags:
        settings.append('the flags of docs/pods.md')
      run = f'gin/{plan.run}.gin' + (f' with {" and ".join(settings)}' if settings else '')
      said.append(
        f'Plan of {run} for {plan.topology}: {found.memory}, {found.tokens_per_s} tokens/s '
        f'estimated, {found.utilization} of the peak.'
      )
    path = _ROOT / 'gin' / 'mesh' / f'{mesh}.gin'
    text = path.read_text(encoding='utf-8')
    wrapped = [x for line in said for x in textwrap.wrap(line, 98, break_on_hyphens=False)]
    header = ''.join(f'# {line}\n' for line in wrapped)
    path.write_text(re.sub(r'# Plan of .*\n(# .*\n)*', header, text, count=1), encoding='utf-8')


def _search(mesh: str) -> None:
  """Tries how many devices share a model, whether parameters are shared out, and recomputation."""
  plan = next(plan for plan in MESHES if plan.mesh == mesh)
  found = []
  kinds = 'none', 'attention', 'layer'
  for partitions, dims, remat in itertools.product((1, 2, 4), (1, 2), kinds):
    others = (
      f'NUM_PARTITIONS={partitions}',
      f'PARAMETER_PARTITIONING_DIMS={dims}',
      f'config.TransformerConfig.remat="{remat}"',
    )
    variant = plan._replace(bindings=(*plan.bindings, *others))
    found.append((_result(variant.args, variant.flags), others))
  # What does not fit comes last.
  found.sort(key=lambda x: (x[0].too_large, -_first(x[0].tokens_per_s)))
  print(f'| {mesh} | memory | tokens/s | utilization |\n| --- | --- | ---: | ---: |')
  for result, others in found:
    print(
      f'| {" ".join(others)} | {result.memory} | {result.tokens_per_s} | {result.utilization} |'
    )


def _first(values: str) -> float:
  return float(values.partition(' to ')[0].replace(',', '') or 0)


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'Unexpected arguments: {argv[1:]}')
  if _SEARCH.value is None:
    _write_page()
    _write_headers()
  elif _SEARCH.value in {plan.mesh for plan in MESHES}:
    _search(_SEARCH.value)
  else:
    raise app.UsageError(f'--search={_SEARCH.value}: no mesh of MESHES')


if __name__ == '__main__':
  app.run(main)
