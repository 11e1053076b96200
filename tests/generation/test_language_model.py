"""Reading, writing, scoring and saved states from Python, on a trained checkpoint."""

import dataclasses
import functools
import json
import os
import pwd
import shutil
import tempfile
import zipfile

import jax
import numpy as np
import pytest
import tiny_task
from util import assert_close, one_device

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.data import datasets, streaming
from tvq_t5x.generation import inspection, language_model
from tvq_t5x.network import decoding
from tvq_t5x.network.layers import RMSNorm
from tvq_t5x.network.sampling import SamplingConfig
from tvq_t5x.network.transformer import Transformer
from tvq_t5x.standalone.evaluation import Evaluator

# The run's task is not the package's own.
load = functools.partial(language_model.load, modules=['tiny_task'])

_TEXT = 'the ship and the sea and a sky.\nthe sky a ship'  # Longer than blocks and window of 8.
_GREEDY = SamplingConfig(temperature=0.0)
pytestmark = pytest.mark.usefixtures('cleared_gin')


@pytest.fixture(scope='module')
def lm(tiny_run):
  with one_device():
    return load(str(tiny_run))


def _forward(lm, tokens):
  """Logits [T, W] of one forward pass from the start of a document."""
  inputs = np.array([[1, *tokens[:-1]]])
  inputs = np.pad(inputs, [(0, 0), (0, -len(tokens) % 8)])
  logits = jax.jit(lm.loaded.model.module.apply)({'params': lm.loaded.params}, inputs)[0]
  return np.asarray(jax.nn.log_softmax(logits[0, : len(tokens)]))


def test_the_score_of_a_text_is_that_of_the_forward_pass(lm):
  score = lm.score(_TEXT)
  tokens = lm.encode(_TEXT)
  np.testing.assert_array_equal(score.tokens, tokens)
  expected = -np.take_along_axis(_forward(lm, tokens), np.array(tokens)[:, None], 1)[:, 0]
  np.testing.assert_allclose(score.nats, expected, rtol=2e-5, atol=1e-5)
  assert score.num_bytes == len(_TEXT)
  bits = expected.sum() / np.log(2) / len(_TEXT)
  assert score.bits_per_byte == pytest.approx(bits, rel=1e-5)


@pytest.mark.parametrize('scan', [False, True])
def test_all_that_is_computed_of_a_text(lm, scan):
  """Logits against scores, codes against those in the state, hidden states against the logits."""
  loaded, config = lm.loaded, lm.loaded.model.config
  assert config.scan_layers
  if scan:
    found = lm.inspect(_TEXT)
  else:
    module = Transformer(dataclasses.replace(config, scan_layers=False))
    layer = jax.tree.map(lambda x: x[0], loaded.params['layers'])
    params = {'layers_0': layer, **{k: x for k, x in loaded.params.items() if k != 'layers'}}
    tokens = np.array(lm.encode(_TEXT), np.int32)
    found = inspection.inspect(module, params, decoding.start(module, 1), tokens)
  score = lm.score(_TEXT)
  nats = -np.asarray(jax.nn.log_softmax(found.logits))
  number = len(score.tokens)
  np.testing.assert_allclose(
    nats[np.arange(number), score.tokens], score.nats, rtol=2e-5, atol=1e-5
  )
  assert found.hidden.shape == (config.num_layers, number, config.emb_dim)
  x = found.hidden[-1]
  if config.final_norm:
    x = RMSNorm().apply({'params': loaded.params['final_norm']}, x)
  head = loaded.params['logits']
  expected = config.logit_scale * (x @ head['dense']['kernel'] + head['bias'])
  np.testing.assert_allclose(found.logits, expected, rtol=1e-4, atol=1e-4)
  assert list(found.codes) == ['layers_0/attention_0', 'layers_0/attention_1']
  for codes, sublayer in zip(found.codes.values(), score.state.decoder.layers, strict=True):
    window = sublayer.codes.shape[2]
    np.testing.assert_array_equal(codes[-window:], sublayer.codes[0, 0])


def test_a_text_goes_on_where_it_is_inspected(lm):
  whole, state = lm.inspect(_TEXT), lm.score(_TEXT[:19]).state
  part = lm.inspect(_TEXT[19:], state)
  np.testing.assert_allclose(part.logits, whole.logits[19:], rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(part.hidden, whole.hidden[:, 19:], rtol=1e-4, atol=1e-4)
  with pytest.raises(ConfigError, match='at least one token'):
    lm.inspect('')


def test_what_it_is_can_be_seen(lm):
  assert 'parameters, step 16 of ' in repr(lm) and 'checkpoint_16, ByteVocabulary)' in repr(lm)
  score = lm.score(_TEXT)
  bits = f'{score.bits_per_byte:.4f} bits per byte'
  assert repr(score) == f'Score({len(_TEXT)} tokens, {score.total_nats:.2f} nats, {bits})'
  state = lm.repeat(score.state, 2)
  assert repr(state).startswith('GenerationState(2 sequences, ') and len(repr(state)) < 50
  shapes = repr(jax.eval_shape(lambda x: x, state))
  assert 'ShapeDtypeStruct' in shapes
  written = repr(lm.generate(state, 3, seed=0))
  assert written.startswith('Generated(tokens 2 x 3, ') and written.endswith(' nats a token)')
  assert repr(lm.inspect(_TEXT)).startswith(f'Inspection({len(_TEXT)} tokens: logits [')


@pytest.mark.parametrize('cuts', [[0], [1], [7, 8], [8, 16, 24], [3, 3, 19], [9, 17, 45]])
def test_a_text_in_parts_is_as_whole(lm, cuts):
  """Scores, the state, and what the model then does."""
  whole = lm.score(_TEXT)
  ends = [0, *cuts, len(_TEXT)]
  parts = [_TEXT[a:b] for a, b in zip(ends, ends[1:], strict=False)]
  scores = list(lm.score_parts(parts))
  nats = np.concatenate([score.nats for score in scores])
  np.testing.assert_allclose(nats, whole.nats, rtol=2e-5, atol=1e-5)
  state = scores[-1].state
  assert_close(state, whole.state)
  np.testing.assert_array_equal(state.decoder.position, whole.state.decoder.position)
  sampling = SamplingConfig(top_p=0.9)
  ours, expected = (lm.generate(s, 24, seed=5, sampling=sampling) for s in (state, whole.state))
  np.testing.assert_array_equal(ours.tokens, expected.tokens)
  np.testing.assert_allclose(ours.log_likelihoods, expected.log_likelihoods, rtol=1e-4, atol=1e-5)


def test_long_texts_are_read_a_part_at_a_time(lm, monkeypatch):
  whole = lm.score(_TEXT)
  monkeypatch.setattr(language_model, '_READ', 16)
  shapes = []
  read = lm._read
  monkeypatch.setattr(
    lm,
    '_read',
    lambda state, tokens, lengths: shapes.append(tokens.shape) or read(state, tokens, lengths),
  )
  np.testing.assert_allclose(lm.score(_TEXT).nats, whole.nats, rtol=2e-5, atol=1e-5)
  assert shapes == [(1, 16), (1, 16), (1, 16)]


def test_the_score_of_a_split_is_its_evaluation(lm):
  cfg = datasets.DatasetConfig('tiny_bytes', {'targets': 64}, 'test', 1, False, None)
  loaded = lm.loaded
  evaluator = Evaluator(
    loaded.model, loaded.partitioner.for_batch(1), loaded.params_shardings, 64, carry_state=True
  )
  found = evaluator(
    loaded.params, streaming.evaluation_batches(cfg, loaded.model.FEATURE_CONVERTER_CLS)
  )
  text = tiny_task.text('test').decode()
  score = lm.score([*lm.encode(text), 1])
  assert score.bits_per_byte == pytest.approx(found['bits_per_byte'], rel=1e-5)


def test_rows_of_different_lengths_on_devices_are_as_each_alone(tiny_run, lm):
  texts = ['', 'a', _TEXT[:8], _TEXT[:21], [value + 3 for value in _TEXT.encode()], 'the', '.', ' ']
  many = load(str(tiny_run))
  state, nats = many.read(many.start(8), texts)
  assert len(state.token.sharding.device_set) == 8
  assert state.token.addressable_shards[0].data.shape == (1,)
  together = many.generate(state, 20, sampling=_GREEDY)
  for i, text in enumerate(texts[:6]):
    alone_state, (alone,) = lm.read(lm.start(), [text])
    np.testing.assert_allclose(nats[i], alone, rtol=2e-5, atol=1e-5)
    alone = lm.generate(alone_state, 20, sampling=_GREEDY)
    np.testing.assert_array_equal(together.tokens[i], alone.tokens[0])


def test_greedy_choice_is_the_likeliest_token_of_the_forward_pass(lm):
  state, _ = lm.read(lm.start(), [_TEXT[:5]])
  tokens, log_likelihoods, _ = lm.generate(state, 20, sampling=_GREEDY)
  text = [*lm.encode(_TEXT[:5]), *tokens[0].tolist()]
  expected = _forward(lm, text)[5:]
  np.testing.assert_array_equal(tokens[0], expected.argmax(-1))
  np.testing.assert_allclose(log_likelihoods[0], expected.max(-1), rtol=1e-4, atol=1e-5)


def test_modes_of_jax_change_nothing(tiny_run, lm):
  state, nats = lm.read(lm.start(2), [_TEXT, 'a'])
  written = lm.generate(state, 18, seed=5, sampling=SamplingConfig(top_p=0.9))
  with (
    one_device(),
    jax.enable_x64(True),
    jax.numpy_rank_promotion('raise'),
    jax.numpy_dtype_promotion('strict'),
  ):
    other = load(str(tiny_run))
    state, other_nats = other.read(other.start(2), [_TEXT, 'a'])
    found = other.generate(state, 18, seed=5, sampling=SamplingConfig(top_p=0.9))
    other.repeat(state, 2)
  jax.tree.map(np.testing.assert_array_equal, (found, other_nats), (written, nats))
  assert {x.dtype for x in jax.tree.leaves(found)} == {x.dtype for x in jax.tree.leaves(written)}


def test_each_seed_of_64_bits_has_its_own_texts(lm):
  seeds = [0, 1, 2**32, 2**32 + 1, -1, 2**32 - 1, 2**63 - 1, -(2**63)]
  found = {tuple(lm.generate(lm.start(), 18, seed=seed).tokens[0].tolist()) for seed in seeds}
  assert len(found) == len(seeds)
  for seed in (2**63, -(2**63) - 1, 1.0, True):
    with pytest.raises(ConfigError, match='^seed = .*: give a whole number from -'):
      lm.generate(lm.start(), 18, seed=seed)


def test_only_ids_that_stand_for_something_are_written(lm):
  found = lm.generate(lm.start(4), 300, sampling=SamplingConfig(temperature=1e6)).tokens
  assert set(found.ravel().tolist()) <= {1, *range(3, 259)}
  assert len(set(found.ravel().tolist())) > 200  # Or it shows little.


def test_n_tokens_and_then_m_are_n_plus_m(lm):
  state = lm.start(3)
  whole = lm.generate(state, 18, seed=1)
  first = lm.generate(state, 9, seed=1)
  second = lm.generate(first.state, 9, seed=1)
  np.testing.assert_array_equal(np.concatenate([first.tokens, second.tokens], 1), whole.tokens)
  assert len({tuple(row) for row in whole.tokens.tolist()}) == 3
  other = lm.generate(state, 18, seed=2)
  assert (other.tokens != whole.tokens).any()


def test_devices_that_can_not_share_the_rows_all_have_them(tiny_run, lm):
  other = load(str(tiny_run), gin_bindings=['NUM_PARTITIONS = 2'])
  states = [m.start(3) for m in (lm, other)]
  ours, theirs = (m.generate(s, 9, seed=1) for m, s in zip((lm, other), states, strict=True))
  np.testing.assert_array_equal(ours.tokens, theirs.tokens)
  assert len(theirs.state.token.sharding.device_set) == 8
  assert theirs.state.token.is_fully_replicated


def test_states_are_repeated(lm):
  state, _ = lm.read(lm.start(), [_TEXT])
  repeated = lm.repeat(state, 3)
  expected, _ = lm.read(lm.start(3), [_TEXT] * 3)
  assert_close(repeated, expected)
  two, _ = lm.read(repeated, ['', 'a', 'the'])
  assert lm.repeat(two, 2).token.tolist() == [115, 115, 100, 100, 104, 104]


# Saved states


def test_a_saved_state_continues(tiny_run, lm, tmp_path):
  state, _ = lm.read(lm.start(), [_TEXT])
  lm.save_state(tmp_path / 'state.npz', state)
  assert [path.name for path in tmp_path.iterdir()] == ['state.npz']
  # With the same parameters, but elsewhere and on another mesh.
  moved = shutil.copytree(tiny_run, tmp_path / 'moved')
  other = load(str(moved), gin_bindings=['NUM_PARTITIONS = 4'])
  loaded = other.load_state(tmp_path / 'state.npz')
  jax.tree.map(np.testing.assert_array_equal, loaded, state)
  ours, theirs = (m.generate(s, 20, sampling=_GREEDY) for m, s in ((lm, state), (other, loaded)))
  np.testing.assert_array_equal(ours.tokens, theirs.tokens)


def test_a_state_in_bfloat16_is_saved_bit_for_bit(tiny_run, tmp_path):
  with one_device():
    bindings = ["config.TransformerConfig.dtype = 'bfloat16'"]
    lm = load(str(tiny_run), gin_bindings=bindings)
  state, _ = lm.read(lm.start(), [_TEXT])
  lm.save_state(tmp_path / 'state.npz', state)
  loaded = lm.load_state(tmp_path / 'state.npz')
  assert 'bfloat16' in {x.dtype.name for x in jax.tree.leaves(loaded)}
  jax.tree.map(np.testing.assert_array_equal, loaded, state)


@pytest.mark.parametrize(
  ('checkpoint', 'binding', 'part'),
  [
    ('checkpoint_8', 'BATCH_SIZE = 8', 'can not be continued with the parameters of'),
    ('', 'config.TransformerConfig.window_len = 4', 'TransformerConfig.window_len = 4, there 8'),
    ('', "config.TransformerConfig.dtype = 'bfloat16'", "dtype = 'bfloat16', there 'float32'"),
  ],
)
def test_a_state_of_something_else_is_refused(tiny_run, lm, tmp_path, checkpoint, binding, part):
  path = tmp_path / 'state.npz'
  lm.save_state(path, lm.start())
  other = load(str(tiny_run / checkpoint), gin_bindings=[binding])
  with pytest.raises(ConfigError) as error:
    other.load_state(path)
  message = str(error.value)
  assert message.startswith(str(path)) and part in message and '\n' not in message


def test_a_state_that_can_not_be_written_is_refused(lm, tmp_path):
  for path in (tmp_path / 'no' / 'state.npz', tmp_path, None):
    with pytest.raises(ConfigError, match='path'):
      lm.save_state(path, lm.start())


def test_what_is_no_state_is_refused(lm, tmp_path):
  with pytest.raises(ConfigError, match='there is no such file'):
    lm.load_state(tmp_path / 'none.npz')
  (tmp_path / 'text.npz').write_text('text')
  np.savez(tmp_path / 'other.npz', a=np.zeros(3))
  lm.save_state(tmp_path / 'cut.npz', lm.start())
  arrays = dict(np.load(tmp_path / 'cut.npz'))
  np.savez_compressed(tmp_path / 'compressed.npz', **arrays)  # It may be much larger than its file.
  name = next(name for name in arrays if name.endswith('values'))
  np.savez(tmp_path / 'short.npz', **{**arrays, name: arrays[name][:, :-1]})
  np.savez(tmp_path / 'kind.npz', **{**arrays, name: arrays[name].view(np.int32)})
  np.savez(tmp_path / 'id.npz', **{**arrays, 'token': np.full_like(arrays['token'], 264)})
  np.savez(tmp_path / 'lacking.npz', **{n: x for n, x in arrays.items() if n != name})
  shutil.copy(tmp_path / 'lacking.npz', tmp_path / 'bytes.npz')
  with zipfile.ZipFile(tmp_path / 'bytes.npz', 'a') as archive:
    archive.writestr(f'{name}.npy', b'no array')
  content = (tmp_path / 'cut.npz').read_bytes()
  (tmp_path / 'cut.npz').write_bytes(content[: len(content) // 2])
  names = ('text', 'other', 'cut', 'compressed', 'short', 'kind', 'id', 'lacking', 'bytes')
  for name in names:
    with pytest.raises(ConfigError, match='is no state of a generation'):
      lm.load_state(tmp_path / f'{name}.npz')


@pytest.mark.parametrize(
  'change',
  [
    None,
    [],
    {'undecoded': None},
    {'undecoded': 3},
    {'undecoded': ['x']},
    {'undecoded': []},
    {'settings': None},
    {'settings': []},
    {'settings': {}},
    {'parameters': None},
    {'vocabulary': 3},
  ],
)
def test_a_state_that_says_something_else_of_itself_is_refused(lm, tmp_path, change):
  """Fields that are missing (None) or of another kind."""
  lm.save_state(tmp_path / 'state.npz', lm.start())
  arrays = dict(np.load(tmp_path / 'state.npz'))
  about = change
  if isinstance(change, dict):
    about = {**json.loads(str(arrays['about'])), **change}
    about = {name: value for name, value in about.items() if value is not None}
  np.savez(tmp_path / 'state.npz', **{**arrays, 'about': np.asarray(json.dumps(about))})
  with pytest.raises(ConfigError, match='is (no|a) state of ') as error:
    lm.load_state(tmp_path / 'state.npz')
  assert len(str(error.value).splitlines()) == 1


# Refusals


def test_one_text_is_no_list_of_them(lm):
  with pytest.raises(ConfigError, match='give a list of texts'):
    lm.read(lm.start(2), 'ab')


@pytest.mark.parametrize('batch_size', [0, -1, 1.5, True])
def test_there_is_at_least_one_sequence(lm, batch_size):
  with pytest.raises(ConfigError, match='give a whole number of at least 1'):
    lm.start(batch_size)


def test_tokens_that_are_none_are_refused(lm):
  for tokens in ([264], [-1], [1.5], [[3]]):
    with pytest.raises(ConfigError, match='whole numbers from 0 to 263'):
      lm.score(tokens)


def test_as_many_texts_as_sequences(lm):
  with pytest.raises(ConfigError, match='1 texts for a state of 2 sequences'):
    lm.read(lm.start(2), ['a'])


@pytest.mark.parametrize('number', [0, 1.5, '1', None, True])
def test_no_number_of_tokens_is_refused(lm, number):
  with pytest.raises(ConfigError, match=f'num_tokens = {number!r}: give a whole number'):
    lm.generate(lm.start(), number)


_WRONG_TYPES = {
  'encode': (lambda lm: lm.encode(3), 'the text = 3: give a str'),
  'encode_bytes': (lambda lm: lm.encode(b'a'), "the text = b'a': give a str"),
  'score': (lambda lm: lm.score(None), 'whole numbers from 0 to 263'),
  'score_bytes': (lambda lm: lm.score(b'a'), 'whole numbers from 0 to 263'),
  'score_ragged': (lambda lm: lm.score([[3], [3, 4]]), 'whole numbers from 0 to 263'),
  'score_state': (lambda lm: lm.score('a', 3), 'state = int: give one of this model'),
  'read': (lambda lm: lm.read(lm.start(), 3), 'texts = 3: give a list of texts'),
  'read_bytes': (lambda lm: lm.read(lm.start(), b'a'), 'give a list of texts'),
  'read_number': (lambda lm: lm.read(lm.start(), [3]), 'whole numbers from 0 to 263'),
  'read_state': (lambda lm: lm.read(None, ['a']), 'state = NoneType: give one of'),
  'text_of_rows': (lambda lm: lm.text([[3]]), 'whole numbers from 0 to 263'),
  'text_negative': (lambda lm: lm.text([-1]), 'whole numbers from 0 to 263'),
  'text_number': (lambda lm: lm.text(3), 'whole numbers from 0 to 263'),
  'text_str': (lambda lm: lm.text('a'), 'whole numbers from 0 to 263'),
  'num_bytes': (lambda lm: lm.num_bytes([-1]), 'whole numbers from 0 to 263'),
  'sampling': (lambda lm: lm.generate(lm.start(), 1, 0, 0.9), 'sampling = 0.9: give a'),
  'seed': (lambda lm: lm.generate(lm.start(), 1, 0.5), 'seed = 0.5'),
  'generate_state': (lambda lm: lm.generate(lm.start().decoder, 1), 'state = DecoderState'),
  'repeat': (lambda lm: lm.repeat(lm.start(), 0), 'times = 0: give a whole number'),
  'repeat_state': (lambda lm: lm.repeat(3, 2), 'state = int'),
  'save': (lambda lm: lm.save_state('x', 3), 'state = int'),
  'undecoded': (lambda lm: lm.save_state('x', lm.start(), [b'', b'']), 'for each of 1 seq'),
}


@pytest.mark.parametrize(('call', 'message'), _WRONG_TYPES.values(), ids=_WRONG_TYPES)
def test_what_is_of_another_type_is_refused(lm, call, message):
  with pytest.raises(ConfigError, match=message):
    call(lm)


def test_a_state_of_other_sizes_is_refused(lm):
  state = lm.start()
  longer = jax.tree.map(lambda x: np.concatenate([x, x], axis=-1), state)
  with pytest.raises(ConfigError, match='give one of this model'):
    lm.read(longer, ['a'] * len(longer.token))


@pytest.mark.parametrize(
  'arguments',
  [
    {'checkpoint': 3},
    {'checkpoint': None},
    {'gin_file': ['a.gin']},
    {'gin_bindings': 'A = 1'},
    {'gin_bindings': 3},
    {'search_paths': 'folder'},
    {'modules': 'tiny_task'},
    {'modules': [3]},
  ],
  ids=str,
)
def test_what_is_loaded_is_named_as_such(tiny_run, arguments):
  ((name, value),) = arguments.items()
  with pytest.raises(ConfigError, match=f'^{name} = '):
    language_model.load(**{'checkpoint': str(tiny_run), **arguments})


def test_neither_a_home_nor_a_temporary_folder_is_needed(tiny_run, monkeypatch):
  """TensorFlow's import asks for the latter, by way of absl."""

  def nowhere():
    raise FileNotFoundError(2, 'No usable temporary directory found')

  monkeypatch.delenv('HOME', raising=False)
  monkeypatch.setattr(pwd, 'getpwuid', lambda uid: {}[uid])
  monkeypatch.setattr(tempfile, 'tempdir', None)
  monkeypatch.setattr(tempfile, '_get_default_tempdir', nowhere)
  assert load(tiny_run).text([100]) == 'a'
  assert tempfile.gettempdir() == os.curdir


def test_iterators_of_tokens_are_text(lm):
  assert lm.text(iter([100, 101])) == lm.text(np.array([100, 101])) == 'ab'
