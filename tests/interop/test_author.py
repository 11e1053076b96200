"""Checkpoints with the names of the paper's own code give its log-probabilities.

`tests/golden/` has arrays of its branch `main`, and `author/` of the others: parameters, tokens,
log-probabilities and the settings they were made with.
"""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import flags
from flax import serialization, traverse_util
from util import one_device

from tvq_t5x import convert
from tvq_t5x.checkpoints import layout
from tvq_t5x.common.errors import CheckpointError, ConfigError
from tvq_t5x.interop import arrays, author, author_files, folder
from tvq_t5x.network.config import TransformerConfig
from tvq_t5x.network.transformer import Transformer
from tvq_t5x.network.vq.quantizer import MIN_COUNT

_HERE = pathlib.Path(__file__).parent
_GOLDEN = _HERE.parent / 'golden'
_MAIN = ['case01_single_head', 'case02_pg19', 'case03_imagenet64', 'case04_multi_head']
_OTHERS = sorted(path.stem for path in (_HERE / 'author').glob('*.npz'))


def _case(name):
  """Parameters as a tree, settings, tokens and log-probabilities."""
  folder = _GOLDEN if name in _MAIN else _HERE / 'author'
  found = dict(np.load(folder / f'{name}.npz'))
  settings = json.loads(str(found['config' if name in _MAIN else 'settings']))
  params = {k.removeprefix('params/'): x for k, x in found.items() if k.startswith('params/')}
  tokens = found['inputs' if name in _MAIN else 'tokens']
  return traverse_util.unflatten_dict(params, sep='/'), settings, tokens, found['logprobs']


def _state(params):
  """As his train state is saved; the optimizer's part is of no use."""
  return {'step': np.int32(7), 'params': params, 'opt_state': {'0': {'mu': np.ones(1000)}}}


def _write_msgpack(path, params):
  path.write_bytes(serialization.msgpack_serialize(_state(params)))
  return path


def _write_settings(tmp_path, settings):
  path = tmp_path / 'settings.json'
  path.write_text(json.dumps(settings))
  return path


def _converted(checkpoint, settings):
  saved = author_files.read(str(checkpoint))
  assert saved.step == 7
  return author.convert(saved.params, settings, f'--author_checkpoint={checkpoint}')


def _log_probabilities(found, tokens, **overrides):
  config = TransformerConfig(**{**found.settings, **overrides})
  module = Transformer(config)
  like = jax.eval_shape(module.init, jax.random.key(0), tokens[:1, :1])['params']
  params = found.params_like(like, config)
  logits, _, _ = jax.jit(module.apply)({'params': params}, tokens)
  return jax.nn.log_softmax(logits)


@pytest.mark.parametrize('name', _MAIN + _OTHERS)
def test_log_probabilities_are_the_authors(name, tmp_path):
  params, settings, tokens, expected = _case(name)
  found = _converted(_write_msgpack(tmp_path / 'checkpoint_7', params), settings)
  overrides = {'scan_layers': False} if name == _MAIN[0] else {}
  # Within 1e-5, or 1e-5 of the value: as float32 has it.
  ours = _log_probabilities(found, tokens, **overrides)
  np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
  ('name', 'factor'),
  [('optimized_gated', 4), ('optimized_old', 1), ('tensor_parallel_gated', 8), (_MAIN[0], 1)],
)
def test_counts_of_the_faster_branches_are_divided_and_codes_remain(name, factor, tmp_path):
  params, settings, _, _ = _case(name)
  # One code is hardly used: its sum is over the least count, before and after.
  flat = traverse_util.flatten_dict(params, sep='/')
  counts, sums = (next(n for n in flat if part in n) for part in ('_count', '_sum'))
  flat[counts] = flat[counts].copy()
  flat[counts].reshape(-1)[:2] = 0.004, 0.02
  params = traverse_util.unflatten_dict(flat, sep='/')
  found = _converted(_write_msgpack(tmp_path / 'checkpoint_7', params), settings)
  assert any(f'divided by {factor}' in note for note in found.notes) == (factor > 1)
  ours = {k: x for k, x in found.params.items() if 'layers.0.attention_0.quantizer' in k}
  count, c_sum = (ours[f'layers.0.attention_0.quantizer.c_{part}'] for part in ('count', 'sum'))
  his_count = flat[counts].reshape(-1)[: count.size].reshape(count.shape)
  his_sum = flat[sums].reshape(-1)[: c_sum.size].reshape(c_sum.shape)
  np.testing.assert_allclose(count, his_count / factor, rtol=1e-6)

  def codes(c_sum, count):
    return c_sum / np.maximum(count, MIN_COUNT)[..., None]

  np.testing.assert_allclose(codes(c_sum, count), codes(his_sum, his_count), rtol=1e-6)


def _legacy_orbax(folder, params, apart):
  """As Orbax 0.1 wrote it: one file, and a folder for each array that lay on several devices."""
  flat = traverse_util.flatten_dict(_state(params), sep='.')
  item = folder / 'state_7' / 'default'
  item.mkdir(parents=True)
  if apart:
    named = {name: x for name, x in flat.items() if name.startswith('params.')}
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
    ocp.Checkpointer(handler).save(folder / 'zarr', args=ocp.args.PyTreeSave(named))
    for name in named:
      shutil.move(folder / 'zarr' / name, item / name)
      flat[name] = f'PLACEHOLDER://{name}'
    shutil.rmtree(folder / 'zarr')
  tree = traverse_util.unflatten_dict(flat, sep='.')
  (item / 'checkpoint').write_bytes(serialization.msgpack_serialize(tree))
  return folder


def _new_orbax(folder, params):
  handler = ocp.PyTreeCheckpointHandler()
  ocp.Checkpointer(handler).save(folder / 'state_7', args=ocp.args.PyTreeSave(_state(params)))
  return folder


@pytest.mark.parametrize(
  'write',
  [
    lambda folder, params: _legacy_orbax(folder, params, apart=False),
    lambda folder, params: _legacy_orbax(folder, params, apart=True),
    _new_orbax,
  ],
  ids=['one file', 'arrays apart', 'of today'],
)
def test_folders_of_orbax_are_read(write, tmp_path):
  params, settings, _, _ = _case('tensor_parallel_gated')
  plain = _converted(_write_msgpack(tmp_path / 'checkpoint_7', params), settings)
  (tmp_path / 'orbax').mkdir()
  found = _converted(write(tmp_path / 'orbax', params), settings)
  assert found.params.keys() == plain.params.keys()
  for name, x in plain.params.items():
    np.testing.assert_array_equal(found.params[name], x)


def test_the_newest_of_a_folder_is_read(tmp_path):
  params, settings, _, _ = _case(_MAIN[0])
  for number in (7, 10, 9):
    _write_msgpack(tmp_path / f'checkpoint_{number}', params)
  assert author_files.read(str(tmp_path)).path.name == 'checkpoint_10'


def _call(*args):
  values = flags.FlagValues()
  convert.define_flags(values)
  values(['convert', *map(str, args)])
  with one_device():
    return convert.run_flags(values)


def test_the_command_writes_a_run(tmp_path, cleared_gin, capsys):
  """Of the paper's run on Enwik8, with the sizes of the arrays; it is read as any other."""
  from tvq_t5x.standalone import configuration

  params, settings, tokens, expected = _case('optimized_gated')
  # Bytes need more ids than the tiny case has.
  flat = traverse_util.flatten_dict(params, sep='/')
  more = 259 - settings['n_vocab']
  for name, axis in (('token_embed/embedding', 0), ('out_proj/kernel', 1), ('out_proj/bias', 0)):
    pads = [(0, more if i == axis else 0) for i in range(flat[name].ndim)]
    low = -1e4 if name == 'out_proj/bias' else 0.0
    flat[name] = np.pad(flat[name], pads, constant_values=low)
  checkpoint = _write_msgpack(
    tmp_path / 'checkpoint_7', traverse_util.unflatten_dict(flat, sep='/')
  )
  file = _write_settings(tmp_path, {**settings, 'dataset': 'enwik8'})
  flag = f'--author_checkpoint={checkpoint}'
  assert _call(flag, f'--author_settings={file}', f'--output={tmp_path / "run"}') == 0
  assert layout.steps_in(tmp_path / 'run') == [7]
  loaded = configuration.load(str(tmp_path / 'run'))
  logits, _, _ = jax.jit(loaded.model.module.apply)({'params': loaded.params}, tokens)
  ours = jax.nn.log_softmax(logits)[..., : settings['n_vocab']]
  np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=1e-5)
  assert configuration.setting('update_len') == settings['sequence_len']


def _lying(path, params):
  """An array that is said to be large, and is not there."""
  _legacy_orbax(path, params, apart=True)
  item = path / 'state_7' / 'default'
  for zarray in item.glob('*embedding*/.zarray'):
    content = json.loads(zarray.read_text())
    content['shape'][0] = 1 << 40
    zarray.write_text(json.dumps(content))


@pytest.mark.parametrize(
  ('damage', 'part'),
  [
    (lambda path: path.write_bytes(path.read_bytes()[:-100]), 'ends too early'),
    (lambda path: path.write_bytes(b''), 'ends too early'),
    (lambda path: path.write_bytes(b'\x93NUMPY' + bytes(100)), 'no msgpack'),
    (lambda path: path.write_bytes(b'\xdf\xff\xff\xff\xff'), 'ends too early'),
    (lambda path: path.write_bytes(serialization.msgpack_serialize({'a': 1})), "no 'step'"),
    (
      lambda path: path.write_bytes(
        serialization.msgpack_serialize({'step': 1, 'params': {'a': {'b': 'text'}}})
      ),
      'no array of numbers',
    ),
    (
      lambda path: path.write_bytes(
        serialization.msgpack_serialize({'step': 1, 'params': {'a': 'PLACEHOLDER://../../etc'}})
      ),
      'there is no array',
    ),
    (lambda path: _lying(path.parent, _case('tensor_parallel_gated')[0]), 'is said to have'),
  ],
  ids=['cut', 'empty', 'foreign', 'claims', 'no state', 'text', 'elsewhere', 'claims an array'],
)
def test_what_can_not_be_read_is_a_line(tmp_path, damage, part):
  path = _write_msgpack(tmp_path / 'checkpoint_1', _case(_MAIN[0])[0])
  damage(path)
  with pytest.raises(CheckpointError) as error:
    author_files.read(str(tmp_path))
  assert part in str(error.value) and '\n' not in str(error.value)


def test_other_models_are_refused(tmp_path):
  params, settings, _, _ = _case('optimized_gated')
  flat = traverse_util.flatten_dict(params, sep='/')
  with pytest.raises(CheckpointError, match='other names'):
    author.convert({'encoder/kernel': np.ones(3)}, settings, 'x')
  quadratic = {n.replace('VQ', 'Full'): x for n, x in flat.items() if 'quantizer' not in n}
  with pytest.raises(ConfigError, match='quadratic baseline'):
    author.convert(quadratic, settings, 'x')
  missing = {n: x for n, x in flat.items() if 'res_proj' not in n}
  with pytest.raises(CheckpointError, match='not those of the paper'):
    author.convert(missing, settings, 'x')
  bent = {n: x[:, :, :-1] if n.endswith('q_proj/kernel') else x for n, x in flat.items()}
  with pytest.raises(CheckpointError, match='not those of the paper'):
    author.convert(bent, settings, 'x')


@pytest.mark.parametrize(
  ('name', 'value', 'part'),
  [
    ('e_scale', None, 'e_scale is missing'),
    ('block_len', 0, 'block_len is 0; give a whole number'),
    ('dtype', 'float64', 'one of float32, bfloat16'),
    ('e_preln', 'yes', '0 or 1'),
  ],
)
def test_wrong_settings_are_named(name, value, part):
  params, settings, _, _ = _case('optimized_gated')
  flat = traverse_util.flatten_dict(params, sep='/')
  settings = {**settings, name: value}
  if value is None:
    del settings[name]
  with pytest.raises(ConfigError, match=part):
    author.convert(flat, settings, 'x')


def test_settings_are_read_from_his_files_and_nothing_is_run(tmp_path):
  python = tmp_path / 'config_x.py'
  python.write_text(
    'import nothing_of_that_name\ndef get_config():\n  config = nothing_of_that_name.Config()\n'
    '  config.d_model = 768  # width\n  config.pe_lam = 100_000\n  config.e_tie = False\n'
    '  config.dtype = jnp.bfloat16\n  config.grad_clip = None\n  config.x = f()\n'
  )
  expected = {'d_model': 768, 'pe_lam': 100_000, 'e_tie': False, 'dtype': 'bfloat16'}
  assert author_files.read_settings(str(python)) == {**expected, 'grad_clip': None}
  command = tmp_path / 'command.sh'
  command.write_text(
    'python3 launch.py --d_model=768 \\\n --dtype="bfloat16" --e_scale=1.0 --mem_len="$MEM"\n'
  )
  found = author_files.read_settings(str(command))
  assert found == {'d_model': 768, 'dtype': 'bfloat16', 'e_scale': 1.0}


@pytest.mark.parametrize('text', ['', '[1]', '{', '{}', '[' * 100_000])
def test_files_without_settings_are_refused(tmp_path, text):
  path = tmp_path / 'settings.json'
  path.write_text(text)
  with pytest.raises(ConfigError, match='--author_settings='):
    author_files.read_settings(str(path))


def test_files_do_not_depend_on_scanning(tmp_path):
  config = TransformerConfig(
    vocab_size=11,
    emb_dim=8,
    key_dim=4,
    num_layers=3,
    num_codes=5,
    block_len=4,
    window_len=4,
    absolute_positions=True,
  )
  apart = dataclasses.replace(config, scan_layers=False)
  like, like_apart = (
    jax.eval_shape(Transformer(c).init, jax.random.key(0), np.ones([1, 1], int))['params']
    for c in (config, apart)
  )
  assert arrays.shapes(like, config) == arrays.shapes(like_apart, apart)
  drawn = {
    n: np.random.default_rng(0).normal(size=x) for n, x in arrays.shapes(like, config).items()
  }
  params = arrays.to_params(like_apart, apart, drawn.__getitem__)
  folder.write_arrays(tmp_path, params, apart, 'float32')
  again = folder.read_params(tmp_path, like, config)
  assert jax.tree.map(np.shape, again) == jax.tree.map(lambda x: x.shape, like)
  for name, x in arrays.by_name(again, config).items():
    np.testing.assert_array_equal(x, drawn[name].astype(np.float32))
