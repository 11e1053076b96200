"""Every gin file that is shipped can be read, and every run fits together on every mesh."""

import importlib
import importlib.util
import inspect
import pathlib
import re
import shutil
import sys

import gin
import jax
import pytest
from flax.linen import partitioning as nn_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from tvq_t5x import train
from tvq_t5x.common.errors import ConfigError
from tvq_t5x.gin_support import parsing
from tvq_t5x.network.sublayers import of_layer as sublayers_of_layer
from tvq_t5x.planning.program import configured_program
from tvq_t5x.standalone import configuration
from tvq_t5x.training import placement, run_limits
from tvq_t5x.training.optimizers import adafactor, adamw, warmup_cosine, warmup_linear
from tvq_t5x.training.partitioning import own_axis_rules

pytestmark = pytest.mark.quick

_ROOT = pathlib.Path(parsing.gin_root())
_FILES = sorted(str(path.relative_to(_ROOT)) for path in _ROOT.rglob('*.gin'))
_RUNS = [name.removesuffix('.gin') for name in _FILES if '/' not in name]
_LRA = ('lra_listops', 'lra_text', 'lra_retrieval', 'lra_image', 'lra_pathfinder', 'lra_pathx')
# Those of small widths.
_SMALL = ('digits_longvq', 'listops_small', *_LRA)
# Those with fewer sequences in a batch than a pod has cores.
_LONG = ('enwik8_base_1m', 'pg19_large_1m')
_QUICK = (*_LONG, 'kjv_tiny', 'photos64_tiny', 'text_tiny', *_SMALL)
_OF_T5X = 'runs/pretrain.gin'
_OF_RUNNER = 'standalone/gin/runs/pretrain.gin'
# What tasks have in common.
_OF_TASKS = ('tasks/task.gin', 'tasks/classification.gin')
_SHARED = [name for name in _FILES if not name.startswith(('runs/', 'standalone/'))]

# Devices, as JAX counts them: cores of a v3, chips of the others.
_MESHES = {
  'data_parallel': 8,
  'fully_sharded': 8,
  'model_parallel_2': 8,
  'gpu_8': 8,
  'gpu_16': 16,
  'one_device': 1,
  'v3_8': 8,
  'v3_32': 32,
  'v3_128': 128,
  'v4_64': 32,
  'v5e_64': 64,
  'v5p_128': 64,
  'v5p_128_sequence': 64,
}
# Whose devices share sequences, that have to be long.
_OF_SEQUENCES = ('v5p_128_sequence',)
# Those that share out what a run of small widths has too little of.
_PODS = ('v3_32', 'v3_128', 'v4_64', 'v5e_64', 'v5p_128')
_RUNS_ON_MESHES = [
  (run, mesh)
  for run in _RUNS
  for mesh in _MESHES
  if (run in _LONG if mesh in _OF_SEQUENCES else run not in _SMALL or mesh not in _PODS)
]
_PERIODS = ('log_period', 'eval_period', 'sample_period', 'checkpoint_period')

# The paper's Table 10 and released scripts.
_SHARED_FIELDS = {
  'key_dim': 128,
  'num_heads': 1,
  'num_layers': 24,
  'num_codes': 512,
  'block_len': 512,
  'window_len': 512,
  'max_wavelength': 1e5,
  'commit_weight': 1e-4,
  'ema_decay': 0.99,
  'head_type': 'gated',
  'attention_type': 'vq',
}
_LARGE = {'emb_dim': 2048, 'value_dim': 4096, 'tied_embeddings': True, 'final_norm': True}
_RATES = ('sinusoid_dropout_rate', 'residual_dropout_rate', 'layer_drop_rate')
_ADAFACTOR = {'update_clip': 1.0, 'weight_decay': 0.0, 'clip_norm': None}
_PAPER = {
  'enwik8_base': {
    'billions': 0.190,
    'fields': {
      'vocab_size': 264,
      'emb_dim': 768,
      'value_dim': 1536,
      'absolute_positions': False,
      'tied_embeddings': False,
      'final_norm': False,
      'logit_scale': 1.0,
      **dict(zip(_RATES, (0.2, 0.5, 0.3), strict=True)),
    },
    'batch': (128, 8192, 2048),
    'optimizer': (
      adamw,
      {'b1': 0.9, 'b2': 0.98, 'eps': 1e-9, 'weight_decay': 2e-4, 'clip_norm': 0.1},
    ),
    'schedule': (4e-4, 10000, 125000),
    'top_p': 0.9,
  },
  'pg19_large': {
    'billions': 1.3,
    'fields': {
      **_LARGE,
      'vocab_size': 32000,
      'absolute_positions': False,
      'logit_scale': 0.005,
      **dict.fromkeys(_RATES, 0.1),
    },
    'batch': (128, 8192, 2048),
    'optimizer': (adafactor, _ADAFACTOR),
    'schedule': (0.01, 10000, 500000),
    'top_p': 0.8,
  },
  'imagenet64_large': {
    'billions': None,  # The paper says 1.2, which its own settings exceed by 4%.
    'fields': {
      **_LARGE,
      'vocab_size': 264,
      'absolute_positions': True,
      'logit_scale': 0.005,
      **dict(zip(_RATES, (0.1, 0.0, 0.0), strict=True)),
    },
    'batch': (128, 12288, 1536),
    'optimizer': (adafactor, _ADAFACTOR),
    'schedule': (0.01, 10000, 500000),
    'top_p': 0.999,
  },
}


class _Device:
  """What a mesh asks of a device that is not there."""

  platform = device_kind = 'cpu'
  process_index = 0

  def __init__(self, number: int):
    self.id = number


@pytest.fixture(autouse=True)
def _clear():
  yield
  gin.clear_config()


def _parse(run, mesh=None, *bindings):
  files = [f'gin/{run}.gin', *([f'gin/mesh/{mesh}.gin'] if mesh else [])]
  if run in _QUICK:
    bindings = ('BATCH_SIZE = 128', *bindings)
  parsing.parse_gin(files, ["MODEL_DIR = 'runs/x'", *bindings])


def _program(run, mesh, *bindings):
  _parse(run, mesh, *bindings)
  return configured_program([_Device(i) for i in range(_MESHES[mesh or 'fully_sharded'])])


def test_there_are_files():
  assert {*_PAPER, *_QUICK} <= set(_RUNS)
  assert {_OF_T5X, _OF_RUNNER} <= set(_FILES)
  assert {f'mesh/{name}.gin' for name in _MESHES} == {n for n in _FILES if n.startswith('mesh/')}


def test_no_folder_is_a_package():
  # On sys.path, `gin` would hide gin-config.
  assert not list(_ROOT.rglob('__init__.py'))


@pytest.mark.parametrize('name', _RUNS)
def test_run_files_pass_the_checks_from_any_folder(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  parsing.parse_gin([f'gin/{name}.gin'], [f"MODEL_DIR = '{tmp_path}'"])
  assert gin.query_parameter('MODEL_DIR/gin.macro.value') == str(tmp_path)


@pytest.mark.parametrize('name', _RUNS)
def test_run_files_need_nothing_but_a_model_dir(name):
  with pytest.raises(ConfigError, match='^required, but not set: MODEL_DIR; '):
    parsing.parse_gin([f'gin/{name}.gin'], [])


def _header(name):
  return (_ROOT / name).read_text().split('from __gin__')[0]


@pytest.mark.parametrize('name', _RUNS)
def test_run_files_say_what_they_are(name):
  for part in ('Parameters:', 'Tokens:', 'Hardware:', f'--gin_file=gin/{name}.gin'):
    assert part in _header(f'{name}.gin')


@pytest.mark.parametrize('name', _SHARED)
def test_shared_files_name_neither_engine(name):
  text = (_ROOT / name).read_text().removeprefix(_header(name))
  imported = re.findall(r'^(?:from|import) +(\S+)', text, re.MULTILINE)
  assert {module.split('.')[0] for module in imported} <= {'__gin__', 'tvq_t5x'}
  assert 'standalone' not in text and 't5x_adapter' not in text


@pytest.mark.parametrize('name', [name for name in _SHARED if '/' in name])
def test_parts_can_be_read_alone(name, monkeypatch):
  monkeypatch.chdir(_ROOT.parent)  # Some include others.
  gin.clear_config()
  with gin.unlock_config():
    gin.parse_config_file(str(_ROOT / name))


def test_both_pretrain_files_set_the_same_macros():
  def macros(name):
    return set(re.findall(r'^([A-Z_]+) =', (_ROOT / name).read_text(), re.MULTILINE))

  required = {'MIXTURE_OR_TASK_NAME', 'TASK_FEATURE_LENGTHS', 'TRAIN_STEPS', 'MODEL_DIR'}
  assert required <= macros(_OF_RUNNER)
  assert macros(_OF_T5X) <= macros(_OF_RUNNER)


@pytest.mark.parametrize(('run', 'mesh'), _RUNS_ON_MESHES)
def test_every_array_of_every_run_divides_on_every_mesh(run, mesh):
  program = _program(run, mesh)
  assert program.partitioner.mesh.size == _MESHES[mesh]
  info = placement.describe(
    program.partitioner, program.model
  )  # Raises if an array does not divide.
  written = re.search(r'Parameters: ([\d,]+)', _header(f'{run}.gin'))
  assert written and written[1] == f'{info.num_parameters:,}'


@pytest.mark.parametrize('run', _PAPER)
def test_the_papers_networks_have_its_sizes(run):
  program = _program(run, 'data_parallel')
  found = placement.describe(program.partitioner, program.model).num_parameters
  assert found == _num_parameters(**{**_SHARED_FIELDS, **_PAPER[run]['fields']})
  if billions := _PAPER[run]['billions']:
    assert found == pytest.approx(billions * 1e9, rel=0.02)


def _num_parameters(
  vocab_size, emb_dim, key_dim, value_dim, num_layers, num_codes, tied_embeddings, final_norm,
  absolute_positions, **_
):  # fmt: skip
  norm = 2 * emb_dim
  of_keys = 3 * emb_dim * key_dim + 2 * key_dim  # Query, key, distances; two biases.
  of_values = 3 * emb_dim * value_dim  # Value, gate, out.
  codebook = num_codes * key_dim + num_codes
  sublayers = 2 * num_layers * (norm + of_keys + of_values + codebook)
  embeddings = (1 if tied_embeddings else 2) * vocab_size * emb_dim + vocab_size
  return sublayers + embeddings + norm * final_norm + absolute_positions


@pytest.mark.parametrize('run', _RUNS)
def test_every_run_ends_its_periods_with_a_batch(run):
  updates = _program(run, 'one_device').num_updates
  periods = {name: configuration.setting(name) for name in _PERIODS}
  run_limits.check_steps(updates, configuration.setting('total_steps'), **periods)
  # T5X's own condition.
  low, high = sorted([periods['eval_period'], periods['checkpoint_period']])
  assert high % low == 0


@pytest.mark.parametrize(
  ('run', 'length'), [(r, n) for r in ('enwik8_base', 'pg19_large') for n in (32768, 131072)]
)
def test_long_contexts_change_the_length_only(run, length):
  plain = _program(run, 'v3_128')
  long = _program(f'{run}_{length // 1024}k', 'v3_128')
  assert long.length == length
  assert long.model.config == plain.model.config
  assert long[2:] == plain._replace(length=length)[2:]
  updates = gin.query_parameter('TRAIN_STEPS/gin.macro.value')
  assert updates == pytest.approx(_PAPER[run]['schedule'][2], rel=1e-3)


@pytest.mark.parametrize('run', _PAPER)
def test_the_papers_runs_have_its_settings(run):
  expected, program = _PAPER[run], _program(run, 'v3_128')
  config = program.model.config
  for name, value in {**_SHARED_FIELDS, **expected['fields']}.items():
    assert getattr(config, name) == value, name
  assert (program.batch_size, program.length, program.update_len) == expected['batch']
  optimizer, settings = expected['optimizer']
  found = gin.get_bindings(optimizer)
  assert {name: found.get(name, _default(optimizer, name)) for name in settings} == settings
  schedule = gin.get_bindings(warmup_cosine)
  assert (schedule['peak'], schedule['warmup_steps'], schedule['total_steps']) == (
    expected['schedule']
  )
  assert schedule.get('final_share', _default(warmup_cosine, 'final_share')) == 0.1
  assert gin.query_parameter('TOP_P/gin.macro.value') == expected['top_p']


# Mega's (arXiv 2209.10655): layers, D, V, K, rate, decay, batch, dropout, updates, warm-up.
_MEGA = {
  'lra_listops': (6, 80, 160, 64, 1e-3, 0.01, 64, 0.1, 90_000, 3_000),
  'lra_text': (4, 128, 256, 64, 4e-3, 0.01, 50, 0.1, 25_000, 10_000),
  'lra_retrieval': (6, 128, 256, 64, 3e-3, 0.04, 64, 0.1, 92_000, 10_000),
  'lra_image': (8, 160, 320, 96, 1e-2, 0.02, 50, 0.0, 180_000, 9_000),
  'lra_pathfinder': (6, 128, 256, 64, 1e-2, 0.01, 128, 0.0, 250_000, 50_000),
  'lra_pathx': (4, 64, 128, 32, 1e-2, 0.01, 128, 0.0, 125_000, 25_000),
}


@pytest.mark.parametrize('run', _LRA)
def test_the_runs_of_the_arena_start_from_megas_settings(run):
  config = _program(run, 'data_parallel').model.config
  batch_size = re.search('^BATCH_SIZE = (.+)$', (_ROOT / f'{run}.gin').read_text(), re.MULTILINE)
  optimizer, schedule = gin.get_bindings(adamw), gin.get_bindings(warmup_linear)
  assert (
    *(config.num_layers, config.emb_dim, config.value_dim, config.key_dim),
    *(schedule['peak'], optimizer['weight_decay'], int(batch_size[1])),
    *(config.residual_dropout_rate, schedule['total_steps'], schedule['warmup_steps']),
  ) == _MEGA[run]
  assert optimizer['decay_follows_rate'] and optimizer['clip_norm'] == 1.0
  assert config.mlp_dim == 2 * config.emb_dim and config.bidirectional


@pytest.mark.parametrize('run', ['lra_listops', 'lra_retrieval', 'lra_image'])
def test_one_setting_makes_transformer_vq_of_longvq(run):
  settings = 'tvq_t5x.network.config.TransformerConfig.sublayers'
  sublayers = [
    [
      type(x.mixer).__name__
      for x in sublayers_of_layer(_program(run, 'data_parallel', *changes).model.config)
    ]
    for changes in ((), (f'{settings} = None',))
  ]
  assert sublayers == [['LongVQ', 'Mlp'], ['VQAttention', 'VQAttention']]


def _default(function, name):
  return inspect.signature(function).parameters[name].default


@pytest.mark.parametrize('part', [n for n in _SHARED if n.startswith('optimizers/')])
def test_optimizers_can_be_exchanged(part, tmp_path):
  bindings = [f"MODEL_DIR = '{tmp_path / 'run'}'", f'BATCH_SIZE = {jax.device_count()}']
  assert train.run(['gin/kjv_tiny.gin', f'gin/{part}'], bindings, dry_run=True) == 0


def test_a_mesh_on_the_command_line_replaces_the_one_of_the_run():
  mesh = _program('pg19_large', 'model_parallel_2').partitioner.mesh
  assert dict(mesh.shape) == {'data': 4, 'model': 2}


def test_only_the_meshes_of_pods_trade_memory_and_compilation_for_speed():
  def settings(mesh):
    config = _program('pg19_large', mesh).model.config
    return config.unroll_layers, config.remat

  assert settings(None) == settings('gpu_16') == (False, 'attention')
  assert settings('v3_128') == (True, 'none')


def test_a_module_of_ones_own_registers_the_task(tmp_path, monkeypatch):
  lines = [
    'from tvq_t5x.data import indexed',
    "splits = ('train', 'validation', 'test')",
    "indexed.byte_level_task('own_bytes', lambda split: [b'text'], splits)",
  ]
  (tmp_path / 'module_of_ones_own.py').write_text('\n'.join(lines))
  monkeypatch.syspath_prepend(tmp_path)
  bindings = {
    'MODEL_DIR': str(tmp_path / 'run'),
    'BATCH_SIZE': jax.device_count(),
    'MIXTURE_OR_TASK_NAME': 'own_bytes',
    'MIXTURE_OR_TASK_MODULE': 'module_of_ones_own',
  }
  bindings = [f'{name} = {value!r}' for name, value in bindings.items()]
  assert train.run(['gin/kjv_tiny.gin'], bindings, dry_run=True) == 0


# T5X's way: its programs, as __main__, and its own run files under ours.

_t5x = importlib.util.find_spec('t5x')
# The tests' own folder of that name has no origin.
_needs_t5x = pytest.mark.skipif(not (_t5x and _t5x.origin), reason='T5X is not installed')


def _parse_as(name, monkeypatch, files, *bindings, folder=_ROOT.parent):
  gin.clear_config()
  from t5x import gin_utils as t5x_gin_utils

  monkeypatch.setitem(sys.modules, '__main__', importlib.import_module(f't5x.{name}'))
  # gin only ever adds folders to search.
  monkeypatch.setattr(gin.config, '_LOCATION_PREFIXES', [''])
  t5x = str(pathlib.Path(_t5x.origin).parents[1])
  t5x_gin_utils.parse_gin_flags([str(folder), t5x], files, bindings, finalize_config=False)


@_needs_t5x
@pytest.mark.parametrize(('run', 'mesh'), _RUNS_ON_MESHES)
def test_t5x_places_the_arrays_of_every_run_like_the_runner(run, mesh, monkeypatch):
  program = _program(run, mesh)
  files = [f'gin/{run}.gin', f'gin/mesh/{mesh}.gin']
  _parse_as('train', monkeypatch, files, "MODEL_DIR = 'runs/x'")
  places = gin.get_bindings('t5x.partitioning.PjitPartitioner')
  rules = places['logical_axis_rules']
  assert places['num_partitions'] == program.partitioner.mesh.shape['model']
  for row in placement.describe(program.partitioner, program.model).rows:
    spec = nn_partitioning.logical_to_mesh_axes(row.logical_axes, rules) or PartitionSpec()
    assert spec == row.spec, row.name
    NamedSharding(program.partitioner.mesh, spec).shard_shape(row.shape)


@_needs_t5x
@pytest.mark.parametrize('run', _RUNS)
def test_t5x_trains_what_the_runner_trains(run, monkeypatch):
  program = _program(run, 'data_parallel')
  _parse_as('train', monkeypatch, [f'gin/{run}.gin'], "MODEL_DIR = 'runs/x'")
  # It would need the vocabulary, which for PG-19 is a file.
  monkeypatch.setattr(run_limits, 'check_vocabulary', lambda *args: None)
  checked = gin.get_configurable('tvq_t5x.t5x_adapter.trainer.checked_trainer')
  gin.bind_parameter('MODEL/gin.macro.value', program.model)
  trainer = checked()  # Refuses what does not fit together.
  assert (trainer.update_len or program.length) == program.update_len
  lengths = gin.query_parameter('TASK_FEATURE_LENGTHS/gin.macro.value')
  assert lengths[program.model.LENGTH_FEATURE] == program.length


@_needs_t5x
def test_t5x_finds_the_files_of_a_wheel(tmp_path, monkeypatch):
  package, folder = tmp_path / 'site-packages' / 'tvq_t5x', tmp_path / 'work'
  shutil.copytree(_ROOT, package / 'gin')
  folder.mkdir()
  monkeypatch.chdir(folder)
  _parse_as('train', monkeypatch, ['gin/kjv_tiny.gin'], folder=package)
  assert gin.get_bindings('t5x.partitioning.standard_logical_axis_rules')['additional_rules']


@_needs_t5x
@pytest.mark.parametrize(
  ('program', 'files', 'required'),
  [
    (
      'train',
      ['gin/pg19_large.gin', 'gin/runs/finetune.gin'],
      ('INITIAL_CHECKPOINT_PATH', 'TRAIN_STEPS', 'MODEL_DIR'),
    ),
    (
      'eval',
      ['gin/runs/eval.gin', 'gin/models/pg19_large.gin', 'gin/tasks/pg19.gin', 'gin/mesh/v3_8.gin'],
      ('CHECKPOINT_PATH', 'EVAL_OUTPUT_DIR'),
    ),
    (
      'infer',
      [
        'gin/runs/infer.gin',
        'gin/models/pg19_large.gin',
        'gin/tasks/pg19.gin',
        'gin/mesh/v3_8.gin',
      ],
      ('CHECKPOINT_PATH', 'INFER_OUTPUT_DIR'),
    ),
    (
      'export',
      ['gin/runs/export.gin', 'gin/models/pg19_large.gin', 'gin/tasks/pg19.gin'],
      ('CHECKPOINT_PATH', 'MODEL_OUTPUT_DIR', 'MODEL_NAME'),
    ),
  ],
)
def test_t5x_programs_read_their_run_files(program, files, required, monkeypatch):
  _parse_as(program, monkeypatch, files)
  missing = {
    name for name in re.findall(r'^([A-Z_]+) = %gin.REQUIRED', gin.config_str(), re.MULTILINE)
  }
  assert missing == set(required)
  rules = gin.get_bindings('t5x.partitioning.standard_logical_axis_rules')['additional_rules']
  assert rules == own_axis_rules()


@_needs_t5x
@pytest.mark.parametrize(
  'task', [n for n in _SHARED if n.startswith('tasks/') and n not in _OF_TASKS]
)
@pytest.mark.parametrize('program', ['eval', 'infer', 'export'])
def test_t5x_programs_refuse_no_task(program, task, monkeypatch):
  model = 'transformer_vq'
  if 'tasks/classification.gin' in (_ROOT / task).read_text():
    if program == 'export':
      pytest.skip('T5X exports language models only.')
    model = 'transformer_vq_encoder'
  parts = [f'runs/{program}.gin', f'models/{model}.gin', 'sizes/tiny.gin', task]
  _parse_as(program, monkeypatch, [f'gin/{part}' for part in (*parts, 'mesh/v3_8.gin')])
  with pytest.raises(ConfigError, match='^required, but not set: [A-Z_, ]+; set each .*$'):
    gin.finalize()
