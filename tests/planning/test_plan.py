"""The plan of a run: the program that is compiled, and what is said of it."""

import dataclasses
import importlib.util
import os
import pathlib
import subprocess
import sys

import gin
import jax
import pytest
from matplotlib import image as matplotlib_image
from programs import SQUARE

from tvq_t5x import plan
from tvq_t5x.common.errors import ConfigError
from tvq_t5x.gin_support import parsing
from tvq_t5x.planning import estimate as estimate_lib
from tvq_t5x.planning import model_flops, report, topologies
from tvq_t5x.planning import program as program_lib
from tvq_t5x.planning.collectives import Traffic
from tvq_t5x.planning.work import Work

needs_libtpu = pytest.mark.skipif(
  not importlib.util.find_spec('libtpu'), reason='libtpu is not installed'
)
_TINY = str(pathlib.Path(__file__).parents[1] / 'tiny.gin')
_CLASSIFIER = str(pathlib.Path(__file__).parents[1] / 'tiny_classifier.gin')
_REFUSAL = (
  'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries '
  '(27.94G) exceeds available HBM (15.48G).'
)


def _configure(*bindings, files=(_TINY,)):
  parsing.parse_gin(files, ["MODEL_DIR = ''", *bindings])


@pytest.fixture(autouse=True)
def _clear():
  yield
  gin.clear_config()


def test_the_program_is_the_one_that_is_configured():
  _configure('BATCH_SIZE = 16', 'NUM_PARTITIONS = 2', 'NUM_MICROBATCHES = 4')
  program = program_lib.configured_program(jax.devices())
  assert program[2:] == (16, 64, 32, 4, None)
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
def compiled():
  _configure('BATCH_SIZE = 16', 'NUM_MICROBATCHES = 2')
  program = program_lib.configured_program(jax.devices())
  return program, program_lib.compile_program(program)


@pytest.fixture(scope='module')
def estimate(compiled):
  program, executable = compiled
  return estimate_lib.estimate(program, 'v3:2x2', SQUARE, executable)


def test_a_batch_has_the_collectives_of_all_updates_and_microbatches(estimate):
  # Devices that share only the batch sum gradients: twice for each update, in float32.
  (key,) = estimate.work.traffic
  assert key == ('all-reduce', 'data')
  gradients = 2 * 2 * 4 * estimate.state.num_parameters
  assert estimate.work.traffic[key].num_bytes == pytest.approx(gradients, rel=0.05)
  assert estimate.work.unknown_loops == 0
  assert estimate.fits and estimate.memory.arguments < estimate.memory.total


def _cells(*estimates):
  """The rows of the tables by their first cell."""
  text = report.tables({str(i): x for i, x in enumerate(estimates)})
  lines = [line for line in text.splitlines() if line.startswith('| ')]
  rows = [line.replace('| |', '|  |')[2:-2].split(' | ') for line in lines]
  return {name: values[0] if len(values) == 1 else values for name, *values in rows}


def test_the_table_has_what_the_compiler_said(estimate):
  cells = _cells(estimate)
  assert cells['parameters'] == f'{estimate.state.num_parameters:,}'
  assert cells['devices'] == '8 (cpu cores), data 8 x model 1'
  assert cells['a batch'] == '16 sequences of 64 tokens, 2 updates of 2 microbatches'
  assert 'all-reduce over data of a core for a batch' in cells
  # No time without the compiler's cycles.
  assert not [name for name in cells if 'tokens/s' in name]


def test_the_table_has_the_flags_that_the_compiler_obeys(estimate, monkeypatch):
  monkeypatch.delenv('LIBTPU_INIT_ARGS', raising=False)
  assert 'LIBTPU_INIT_ARGS' not in _cells(estimate)
  monkeypatch.setenv('LIBTPU_INIT_ARGS', '--xla_some_flag=true')
  assert _cells(estimate)['LIBTPU_INIT_ARGS'] == '`--xla_some_flag=true`'


def _with_work(estimate, **fields):
  """An estimate of 0.1 s of cycles, 0.1 s of other instructions, and what `fields` say."""
  work = Work(
    flops=615_000_000_000,
    num_bytes=10,
    cycles=94_000_000,
    bytes_without_estimate=45_000_000_000,
    parts={'projections': 54_000_000, 'copies': 40_000_000},
    traffic={},
    unknown_loops=0,
  )
  work = dataclasses.replace(work, **fields)
  return dataclasses.replace(estimate, work=work, model_flops=8 * 1_230_000_000_000)


@pytest.mark.parametrize(
  ('asynchronous', 'tokens_per_s', 'utilization'),
  [
    (0.0, '2,560', "5%, by the program's FLOPs 2%"),
    (0.1, '2,560 to 3,413', "5% to 7%, by the program's FLOPs 2% to 3%"),
    # Nothing hides what takes longer than all the rest.
    (0.2, '2,560 to 5,120', "5% to 10%, by the program's FLOPs 2% to 5%"),
  ],
)
def test_tokens_per_second_count_what_devices_exchange(
  estimate, asynchronous, tokens_per_s, utilization
):
  traffic = {('all-gather', 'data'): Traffic(3, 10**9, 0.2, asynchronous)}
  cells = _cells(_with_work(estimate, traffic=traffic))
  assert cells['all-gather over data of a core for a batch'] == '1 GB in 3, 0.2 s'
  assert cells["the compiler's estimate for a batch"] == '94 M cycles, 0.1 s'
  assert cells['what it has no estimate for'] == '45 GB moved, 0.1 s'
  assert cells['so, estimated, tokens/s'] == tokens_per_s
  assert cells['utilization of the peak, 61.5 TFLOP/s'] == utilization


def test_loops_of_unknown_length_are_told(estimate):
  assert (
    _cells(_with_work(estimate, unknown_loops=1))['loops of unknown length, counted once'] == '1'
  )


def test_the_parts_of_several_plans_stand_beside_each_other(estimate):
  other = {'projections': 54_000_000, 'norm': 20_000_000, 'copies': 20_000_000}
  cells = _cells(_with_work(estimate), _with_work(estimate, parts=other))
  assert cells['projections'] == ['54 (57%)', '54 (57%)']
  assert cells['copies'] == ['40 (43%)', '20 (21%)']
  assert cells['norm'] == ['', '20 (21%)']


def test_the_picture_has_a_bar_for_every_part(estimate, tmp_path):
  path = str(tmp_path / 'parts.png')
  report.draw(path, {'this': _with_work(estimate)})
  low = matplotlib_image.imread(path).shape[0]
  more = dict.fromkeys(['norm', 'cache', 'copies', 'optimizer'], 1000)
  report.draw(path, {'this': _with_work(estimate, parts=more)})
  assert matplotlib_image.imread(path).shape[0] > low


def test_the_models_flops_are_those_of_its_products_forward_and_twice_backward():
  _configure("config.TransformerConfig.attention_type = 'quadratic'", 'UPDATE_LEN = 64')
  program = program_lib.configured_program(jax.devices())
  c, tokens = program.model.config, program.num_tokens
  d, k, h, v = c.emb_dim, c.key_dim, c.num_heads, c.value_width
  projections = d * (2 * h * k + 3 * h * v) * tokens
  scores_and_values = (h * k + h * v) * 64 * tokens
  # What queries and distances give; a distance is projected once for all sequences.
  distances = (c.window_len + 1) * h * k * (tokens + d)
  layers = c.num_layers * 2 * (projections + scores_and_values + distances)
  expected = 3 * 2 * (layers + d * c.vocab_size * tokens)
  assert model_flops.model_flops(program) == expected


def test_the_models_flops_do_not_depend_on_what_is_computed_again():
  def flops(*bindings):
    _configure('BATCH_SIZE = 16', *bindings)
    return model_flops.model_flops(program_lib.configured_program(jax.devices()))

  everything = flops("config.TransformerConfig.remat = 'layer'")
  assert everything == flops("config.TransformerConfig.remat = 'none'")


def test_an_encoder_is_planned_as_a_language_model_is():
  def flops(batch_size):
    _configure(f'BATCH_SIZE = {batch_size}', files=(_CLASSIFIER,))
    return model_flops.model_flops(program_lib.configured_program(jax.devices()))

  # All but the projected distances is of an example.
  assert flops(24) - flops(16) == flops(16) - flops(8) > 0


def _refused(estimate, text):
  return estimate_lib.refused(estimate.program, 'v3:2x2', SQUARE, RuntimeError(text))


def test_a_program_that_the_compiler_refuses_does_not_fit(estimate):
  refused = _refused(estimate, _REFUSAL)
  assert not refused.fits
  assert refused.memory.temporaries == int(27.94 * 2**30)
  assert refused.memory.arguments == estimate.state.num_bytes_per_device
  assert _cells(refused)['headroom'] == 'none, 13.4 GB too much'


def test_other_errors_of_the_compiler_are_not_hidden(estimate):
  with pytest.raises(RuntimeError, match='INTERNAL'):
    _refused(estimate, 'INTERNAL: something else')


def _run(topology, *bindings, files=(_TINY,), **flags):
  return plan.run(files, bindings, (), topology, **flags)


def test_too_many_bytes_in_all_do_not_fit(estimate):
  chip = estimate.chip._replace(hbm_bytes=estimate.memory.total)
  assert dataclasses.replace(estimate, chip=chip).fits
  chip = chip._replace(hbm_bytes=chip.hbm_bytes - 1)
  assert not dataclasses.replace(estimate, chip=chip).fits


def _without_tpus(monkeypatch):
  monkeypatch.setattr(topologies, 'devices_of', lambda topology: jax.devices())
  monkeypatch.setattr(topologies, 'network_of', lambda topology, devices: SQUARE)


def test_what_does_not_fit_exits_with_1_and_advice_that_is_accepted(monkeypatch, capsys):
  def refuse(program):
    raise jax.errors.JaxRuntimeError(_REFUSAL)

  _without_tpus(monkeypatch)
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
  advice = report.advice(dataclasses.replace(estimate, program=program))
  assert '--gin.' not in advice and 'a topology with more devices' in advice


def test_settings_to_compare_come_after_the_others(compiled, monkeypatch, capsys):
  _without_tpus(monkeypatch)
  # What is compiled is not what this is about.
  monkeypatch.setattr(program_lib, 'compile_program', lambda program: compiled[1])
  others = 'gin/mesh/model_parallel_2.gin --gin.BATCH_SIZE=32', 'NUM_MICROBATCHES=2'
  assert _run('v3:2x2', 'BATCH_SIZE = 16', compare=others) == 0
  cells = [line.strip('| ').split(' | ') for line in capsys.readouterr().out.splitlines()]
  rows = {name: values for name, *values in cells}
  assert rows['v3:2x2'] == ['as given', *others]
  assert [x.split(', ')[1] for x in rows['devices']] == [
    'data 8 x model 1',
    'data 4 x model 2',
    'data 8 x model 1',
  ]
  assert [x.split(' of ')[0] for x in rows['a batch']] == [
    '16 sequences',
    '32 sequences',
    '16 sequences',
  ]


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ({'compare': ['gin/mesh/v9.gin']}, '--gin_file=gin/mesh/v9.gin: no such file'),
    ({'compare': ['BATCH_SIZE=12']}, 'DatasetConfig.batch_size = 12'),
    ({'compare': ['NUM_PARTITIONS=3']}, 'is not accepted with 8 devices'),
    ({'compare': [' ']}, '--compare is empty'),
    ({'png': 'no_such_folder/parts.png'}, 'there is no folder'),
    ({'png': 'parts.jpg'}, 'give a file that ends in .png'),
  ],
)
def test_what_can_not_be_compared_or_drawn_is_refused_before_the_first_compile(
  flags, message, monkeypatch, capsys
):
  _without_tpus(monkeypatch)
  monkeypatch.setattr(program_lib, 'compile_program', None)
  assert _run('v3:2x2', **flags) == 2
  assert message in capsys.readouterr().err


@pytest.mark.parametrize(
  ('topology', 'wraps'),
  [
    ('v3:8x8', (False, False)),
    ('v3:32x32', (True, True)),
    ('v5e:16x8', (True, False)),
    ('v4:4x4x2', (False, False, False)),
    ('v4:4x4', (False, False, False)),
    ('v5p:4x4x8', (True, True, True)),
  ],
)
def test_axes_of_whole_pods_and_of_whole_cubes_wrap_around(topology, wraps):
  network = topologies.network_of(topology, [])
  assert network.wraps == wraps and len(network.shape) == len(wraps)


@pytest.mark.parametrize(
  ('topology', 'message'),
  [
    ('', '--topology have to be given'),
    ('v5e:8x8x2', 'give the chips along each of 2 axes'),
    ('v3:0x2', 'give the chips along each of 2 axes'),
    ('v9:2x2', 'give one of v2, v3, v4, v5e, v5p, v6e'),
    ('v3', 'give the chips along each of 2 axes, such as v3:8x8'),
    ('v3-128', 'give one of v2'),
  ],
)
def test_unknown_topologies_are_refused(topology, message, capsys):
  assert _run(topology) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert message in line


def test_without_libtpu_it_says_what_to_install(monkeypatch, capsys):
  found = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, 'find_spec', lambda name, *a: None if name == 'libtpu' else found(name, *a)
  )
  assert _run('v3:2x2') == 2
  assert 'pip install "jax[tpu]==' in capsys.readouterr().err


def _command(flags, *args):
  return subprocess.run(
    [sys.executable, '-m', 'tvq_t5x.plan', f'--gin_file={_TINY}', '--topology=v3:2x2', *args],
    env={**os.environ, 'XLA_FLAGS': flags, 'PYTHONPATH': str(pathlib.Path(_TINY).parent)},
    capture_output=True,
    text=True,
    check=False,
  )


@needs_libtpu
def test_the_command_compiles_for_tpus(tmp_path):
  path = tmp_path / 'parts.png'
  longvq = 'gin/models/longvq.gin'
  done = _command('', f'--compare={longvq} NUM_PARTITIONS=2', f'--png={path}')
  assert done.returncode == 0, done.stderr
  devices = '8 (TPU v3 cores), data'
  assert f'| devices | {devices} 8 x model 1 | {devices} 4 x model 2 |' in done.stdout
  rows = {line.split(' | ')[0].strip('| ') for line in done.stdout.splitlines()}
  assert rows > {'so, estimated, tokens/s', 'collectives', 'utilization of the peak, 61.5 TFLOP/s'}
  assert rows > {'projections', 'quantizer', 'optimizer', 'logits and loss', 'state-space layer'}
  assert 'Assumed: chips 2 x 2, links of 82 GB/s each way' in done.stdout
  assert matplotlib_image.imread(path).shape[0] > 100
  (log,) = done.stderr.splitlines()
  assert log.endswith('Compiling; the large models take minutes.')


@needs_libtpu
def test_why_a_compiler_aborts_is_seen():
  done = _command(flags='--xla_no_such_flag')
  assert done.returncode != 0
  assert 'Unknown flag in XLA_FLAGS: --xla_no_such_flag' in done.stderr
