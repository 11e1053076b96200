"""The plan of a run: what is read from a compiled program, and what is said of it."""

import importlib.util
import os
import pathlib
import subprocess
import sys
import textwrap

import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxlib import xla_client
from tensorflow.compiler.xla.service import hlo_pb2

from tvq_t5x import plan
from tvq_t5x.common.errors import ConfigError
from tvq_t5x.gin_support import parsing
from tvq_t5x.planning import hlo, report, topologies
from tvq_t5x.planning import program as program_lib
from tvq_t5x.training.placement import StateInfo

needs_libtpu = pytest.mark.skipif(
  not importlib.util.find_spec('libtpu'), reason='libtpu is not installed'
)
_TINY = str(pathlib.Path(__file__).parents[1] / 'tiny.gin')
_REFUSAL = (
  'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries '
  '(27.94G) exceeds available HBM (15.48G).'
)

# As libtpu writes it, shortened: a loop of 3, whose counter takes steps of 2, in a loop of 4, with
# a matrix product and an all-reduce in the inner one.
_LOOPS = (pathlib.Path(__file__).parent / 'loops.hlo').read_text()


def _work(text: str) -> hlo.Work:
  """Of a program that is given in XLA's notation."""
  module = xla_client.hlo.hlo_module_from_text(text)
  return hlo.work_of(hlo_pb2.HloModuleProto.FromString(module.as_serialized_hlo_module_proto()))


def _program(*lines: str, before: str = '') -> str:
  body = '\n'.join(f'  {line}' for line in lines)
  return f'HloModule m\n\n{before}ENTRY %main {{\n{body}\n}}\n'


def test_everything_in_a_loop_counts_as_often_as_it_runs():
  work = _work(_LOOPS)
  assert work.flops == 12 * 2 * 16 * 128 * 64
  assert work.cycles == 12 * 100
  assert work.collectives == {'all-reduce': hlo.Collective(12, 12 * 2 * 16 * 64)}
  of_the_fusion, of_the_collective = 16 * 128 + 128 * 64 + 16 * 64, 2 * 16 * 64
  # Three numbers of four bytes, besides, for the counter.
  assert work.num_bytes == 12 * (2 * (of_the_fusion + of_the_collective) + 3 * 4)
  assert work.unknown_loops == 0


def test_loops_of_unknown_length_count_once_and_are_reported():
  work = _work(_LOOPS.replace(', backend_config={"known_trip_count":{"n":"4"}}', ''))
  assert work.unknown_loops == 1 and work.cycles == 3 * 100


def test_a_product_whose_batch_is_an_axis_of_the_window():
  text = _program(
    '%left = bf16[128,64,1]{1,0,2} parameter(0)',
    '%right = bf16[8,256,128]{2,1,0} parameter(1)',
    'ROOT %c = bf16[8,256,64]{1,2,0} convolution(%left, %right), '
    'window={size=8 pad=7_7 rhs_reversal=1}, dim_labels=fb0_0oi->0fb',
  )
  assert _work(text).flops == 2 * 8 * 256 * 64 * 128


def test_a_convolution_with_strides_and_dilation_counts_what_is_not_padding():
  text = _program(
    '%left = f32[2,5,3]{2,1,0} parameter(0)',
    '%right = f32[3,3,7]{2,1,0} parameter(1)',
    'ROOT %c = f32[2,5,7]{2,1,0} convolution(%left, %right), '
    'window={size=3 stride=2 pad=2_2 lhs_dilate=2}, dim_labels=b0f_0io->b0f',
  )
  # Positions o of 5 and k of 3 with 0 <= 2 o - 2 + k <= 8 and even: k = 0 and 2.
  positions = sum(0 <= 2 * o - 2 + k <= 8 for o in range(5) for k in (0, 2))
  assert _work(text).flops == 2 * 2 * 7 * 3 * positions


@pytest.mark.parametrize(
  ('shape', 'start', 'num_bytes'),
  [
    ('(f32[100], f32[800])', 'all-gather-start(%x), dimensions={0}', 8 * 400),
    ('f32[800]', 'all-gather(%x), dimensions={0}', 8 * 400),
    ('f32[25]', 'reduce-scatter(%x), dimensions={0}, to_apply=%add', 400),
    ('(f32[100], f32[100])', 'collective-permute-start(%x), source_target_pairs={{0,1}}', 400),
    ('f32[100]', 'all-reduce-start(%x), to_apply=%add', 400),
  ],
)
def test_a_collective_has_the_bytes_of_the_whole_array(shape, start, num_bytes):
  kind = start.partition('(')[0].removesuffix('-start')
  add = """\
    %add {
      %a = f32[] parameter(0)
      %b = f32[] parameter(1)
      ROOT %sum = f32[] add(%a, %b)
    }

    """
  lines = ['%x = f32[100] parameter(0)', f'%start = {shape} {start}']
  if '-start' in start:
    lines.append(f'ROOT %done = {shape.split(" ")[-1].strip(")")} {kind}-done(%start)')
  work = _work(_program(*lines, before=textwrap.dedent(add)))
  assert work.collectives == {kind: hlo.Collective(1, num_bytes)}


def test_a_slice_of_an_array_moves_no_more_than_the_slice():
  fusion = textwrap.dedent("""\
    %slices (all: f32[24,100], i: s32[], new: f32[1,100]) -> f32[24,100] {
      %all = f32[24,100]{1,0} parameter(0)
      %i = s32[] parameter(1)
      %new = f32[1,100]{1,0} parameter(2)
      %zero = s32[] constant(0)
      %old = f32[1,100]{1,0} dynamic-slice(%all, %i, %zero), dynamic_slice_sizes={1,100}
      %sum = f32[1,100]{1,0} add(%old, %new)
      ROOT %put = f32[24,100]{1,0} dynamic-update-slice(%all, %sum, %i, %zero)
    }

    """)
  text = _program(
    '%all.1 = f32[24,100]{1,0} parameter(0)',
    '%i.1 = s32[] parameter(1)',
    '%new.1 = f32[1,100]{1,0} parameter(2)',
    'ROOT %f = f32[24,100]{1,0} fusion(%all.1, %i.1, %new.1), kind=kLoop, calls=%slices',
    before=fusion,
  )
  # The old row, the new one, the index, and the row that is written.
  assert _work(text).num_bytes == 400 + 400 + 4 + 400


def test_a_slice_that_is_copied_meanwhile_moves_no_more_either():
  text = _program(
    '%all = f32[24,100] parameter(0)',
    '%start = ((f32[24,100]), f32[1,100], s32[]) slice-start(%all), slice={[3:4], [0:100]}',
    'ROOT %done = f32[1,100] slice-done(%start)',
  )
  assert _work(text).num_bytes == 400 + 400


@pytest.mark.parametrize('condition', ['pred', 's32'])
def test_what_both_branches_do_counts(condition):
  branches = textwrap.dedent("""\
    %square {
      %a = f32[8,8] parameter(0)
      ROOT %product = f32[8,8] dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
    }

    %same {
      ROOT %b = f32[8,8] parameter(0)
    }

    """)
  names = {
    'pred': 'true_computation=%square, false_computation=%same',
    's32': 'branch_computations={%same, %square}',
  }
  text = _program(
    f'%if = {condition}[] parameter(0)',
    '%x = f32[8,8] parameter(1)',
    f'ROOT %y = f32[8,8] conditional(%if, %x, %x), {names[condition]}',
    before=branches,
  )
  assert _work(text).flops == 2 * 8 * 8 * 8


def test_a_compiled_loop_over_eight_devices():
  mesh = Mesh(np.array(jax.devices()), ('data',))
  rows, whole = (NamedSharding(mesh, PartitionSpec(axis)) for axis in ('data', None))

  def descend(x, w):
    return jax.lax.scan(lambda w, _: (w - x.T @ (x @ w), None), w, length=5)[0]

  x, w = jnp.zeros([64, 32]), jnp.zeros([32, 16])
  compiled = jax.jit(descend, in_shardings=(rows, whole), out_shardings=whole).lower(x, w).compile()
  work = hlo.work_of(hlo.module_of(compiled))
  assert work.collectives == {'all-reduce': hlo.Collective(5, 5 * 4 * 32 * 16)}
  assert work.flops == 5 * 2 * (2 * 8 * 32 * 16)
  assert work.unknown_loops == 0


def _configure(*bindings, files=(_TINY,)):
  parsing.parse_gin(files, ["MODEL_DIR = ''", *bindings])


@pytest.fixture(autouse=True)
def _clear():
  yield
  gin.clear_config()


def test_the_program_is_the_one_that_is_configured():
  _configure('BATCH_SIZE = 16', 'NUM_PARTITIONS = 2', 'NUM_MICROBATCHES = 4')
  program = program_lib.configured_program(jax.devices())
  assert program[2:] == (16, 64, 32, 4)
  assert program.num_updates == 2 and program.num_tokens == 16 * 64
  assert dict(program.partitioner.mesh.shape) == {'data': 4, 'model': 2}


def test_a_batch_that_does_not_divide_is_refused():
  _configure('BATCH_SIZE = 12')
  with pytest.raises(ConfigError, match=r'DatasetConfig\.batch_size = 12'):
    program_lib.configured_program(jax.devices())


def test_neither_text_nor_vocabulary_is_needed():
  _configure(files=['gin/pg19_large.gin'])
  assert program_lib.configured_program(jax.devices()).model.config.vocab_size == 32000


@pytest.fixture(scope='module')
def estimate():
  _configure('BATCH_SIZE = 16', 'NUM_MICROBATCHES = 2')
  program = program_lib.configured_program(jax.devices())
  return report.estimate(
    program, 'v3:2x2', topologies.CHIPS['v3'], program_lib.compile_program(program)
  )


def test_a_batch_has_the_collectives_of_all_updates_and_microbatches(estimate):
  # Devices that share only the batch sum gradients: twice for each update, in float32.
  (kind,) = estimate.work.collectives
  assert kind == 'all-reduce'
  gradients = 2 * 2 * 4 * estimate.state.num_parameters
  assert estimate.work.collectives[kind].num_bytes == pytest.approx(gradients, rel=0.05)
  assert estimate.work.unknown_loops == 0
  assert estimate.fits and estimate.memory.arguments < estimate.memory.total


def test_the_table_has_what_the_compiler_said(estimate):
  table = report.table(estimate)
  cells = dict(line.strip('| ').split(' | ') for line in table.splitlines()[2:])
  assert cells['parameters'] == f'{estimate.state.num_parameters:,}'
  assert cells['devices'] == '8 (cpu cores), data 8 x model 1'
  assert cells['a batch'] == '16 sequences of 64 tokens, 2 updates of 2 microbatches'
  assert 'all-reduce of a core for a batch' in cells
  # No time without the compiler's cycles.
  assert not [name for name in cells if 'tokens/s' in name]


def test_tokens_per_second_follow_from_cycles_and_clock(estimate):
  work = hlo.Work(84_600_000_000_000, 10, 94_000_000, {}, unknown_loops=1)
  table = report.table(report.dataclasses.replace(estimate, work=work))
  assert '| FLOPs of a core for a batch | 84.6 T |' in table
  assert '94 M cycles, 0.1 s' in table
  assert f'| so, estimated, tokens/s | {16 * 64 * 10:,} |' in table
  assert 'loops of unknown length, counted once | 1 ' in table


def _refused(estimate, text):
  return report.refused(estimate.program, 'v3:2x2', estimate.chip, RuntimeError(text))


def test_a_program_that_the_compiler_refuses_does_not_fit(estimate):
  refused = _refused(estimate, _REFUSAL)
  assert not refused.fits
  assert refused.memory.temporaries == int(27.94 * 2**30)
  assert isinstance(refused.state, StateInfo) and 'none, 13.4 GB too much' in report.table(refused)


def test_other_errors_of_the_compiler_are_not_hidden(estimate):
  with pytest.raises(RuntimeError, match='INTERNAL'):
    _refused(estimate, 'INTERNAL: something else')


def _run(topology, *bindings, files=(_TINY,)):
  return plan.run(files, bindings, (), topology)


def test_too_many_bytes_in_all_do_not_fit(estimate):
  chip = estimate.chip._replace(hbm_bytes=estimate.memory.total)
  assert report.dataclasses.replace(estimate, chip=chip).fits
  chip = chip._replace(hbm_bytes=chip.hbm_bytes - 1)
  assert not report.dataclasses.replace(estimate, chip=chip).fits


def test_what_does_not_fit_exits_with_1_and_advice_that_is_accepted(monkeypatch, capsys):
  def refuse(program):
    raise jax.errors.JaxRuntimeError(_REFUSAL)

  monkeypatch.setattr(topologies, 'devices_of', lambda topology: jax.devices())
  monkeypatch.setattr(program_lib, 'compile_program', refuse)
  assert _run('v3:2x2', 'BATCH_SIZE = 16') == 1
  out, err = capsys.readouterr()
  assert '| headroom | none, ' in out
  advice = [line.split(':')[0] for line in err.splitlines() if '--gin.' in line]
  assert [a.partition('=')[0] for a in map(str.strip, advice)] == [
    '--gin.NUM_MICROBATCHES',
    '--gin.config.TransformerConfig.remat',
    '--gin.config.TransformerConfig.reduction',
    '--gin.NUM_PARTITIONS',
  ]
  for flag in advice:
    (binding,) = parsing.rewrite_gin_args([flag.strip().replace('\\"', '"')])
    _configure('BATCH_SIZE = 16', binding.partition('=')[2])
    program_lib.configured_program(jax.devices())


def test_advice_is_only_what_is_left_to_do(estimate):
  _configure(
    "config.TransformerConfig.remat = 'layer'",
    "config.TransformerConfig.reduction = 'serial'",
    'NUM_PARTITIONS = 8',
    'NUM_MICROBATCHES = 8',
  )
  program = program_lib.configured_program(jax.devices())
  advice = report.advice(report.dataclasses.replace(estimate, program=program))
  assert '--gin.' not in advice and 'a topology with more devices' in advice


@pytest.mark.parametrize(
  ('topology', 'message'),
  [
    ('', '--topology have to be given'),
    ('v9:2x2', 'give one of v2, v3, v4, v5e, v5p, v6e'),
    ('v3', 'give such as v3:8x8'),
    ('v3-128', 'give one of v2'),
  ],
)
def test_unknown_topologies_are_refused(topology, message, capsys):
  assert _run(topology) == 2
  assert message in capsys.readouterr().err


def test_without_libtpu_it_says_what_to_install(monkeypatch, capsys):
  found = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, 'find_spec', lambda name, *a: None if name == 'libtpu' else found(name, *a)
  )
  assert _run('v3:2x2') == 2
  assert 'pip install libtpu' in capsys.readouterr().err


def _command(flags):
  return subprocess.run(
    [sys.executable, '-m', 'tvq_t5x.plan', f'--gin_file={_TINY}', '--topology=v3:2x2'],
    env={**os.environ, 'XLA_FLAGS': flags, 'PYTHONPATH': str(pathlib.Path(_TINY).parent)},
    capture_output=True,
    text=True,
    check=False,
  )


@needs_libtpu
def test_the_command_compiles_for_tpus():
  done = _command(flags='')
  assert done.returncode == 0, done.stderr
  assert '| devices | 8 (TPU v3 cores), data 8 x model 1 |' in done.stdout
  assert '| so, estimated, tokens/s | ' in done.stdout
  (log,) = done.stderr.splitlines()
  assert log.endswith('Compiling; the large models take minutes.')


@needs_libtpu
def test_why_a_compiler_aborts_is_seen():
  done = _command(flags='--xla_no_such_flag')
  assert done.returncode != 0
  assert 'Unknown flag in XLA_FLAGS: --xla_no_such_flag' in done.stderr
