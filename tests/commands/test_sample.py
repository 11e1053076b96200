"""`python -m tvq_t5x.sample`: texts as they are made, images, scores, sessions in parts."""

import contextlib
import itertools
import json
import os
import pathlib

import gin
import numpy as np
import pytest
from absl import flags
from data_util import other_sentencepiece_model
from matplotlib import image as matplotlib_image
from util import one_device, without_vocabulary

from tvq_t5x import sample
from tvq_t5x.commands import sampling_session
from tvq_t5x.data import vocabularies
from tvq_t5x.generation import language_model
from tvq_t5x.network.sampling import SamplingConfig

_TESTS = pathlib.Path(__file__).parents[1]
_TINY = str(_TESTS / 'tiny.gin')
_PROMPT = 'the ship and a sea'
# A task whose vocabulary is another one than that of the checkpoint, of the same size.
_OTHER_VOCABULARY = """
from __gin__ import dynamic_registration
from tvq_t5x.data import vocabularies
include '{tiny}'
VOCABULARY = @vocabularies.{name}()
{binding}
"""


@pytest.fixture(scope='module', autouse=True)
def _one_device():
  with one_device():
    yield


@pytest.fixture(scope='module')
def tiny_run(tiny_run, tmp_path_factory):
  """It does not say its vocabulary: here it has several."""
  return without_vocabulary(tiny_run, tmp_path_factory.mktemp('earlier') / 'run')


@pytest.fixture(scope='module')
def lm(tiny_run):
  return language_model.load(str(tiny_run), modules=['tiny_task'])


@pytest.fixture(autouse=True)
def _quick(lm, monkeypatch):
  """The same checkpoint and settings have the same programs, which are compiled once."""

  def make(loaded):
    mine = lm.loaded
    same = loaded.checkpoint == mine.checkpoint and loaded.model.config == mine.model.config
    same &= loaded.model.output_vocabulary == mine.model.output_vocabulary
    return lm if same else language_model.LanguageModel(loaded)

  monkeypatch.setattr(sampling_session, 'LanguageModel', make)
  monkeypatch.setattr(sampling_session, '_TEXT_CHUNK', 8)
  yield
  gin.clear_config()


@pytest.fixture
def call(tiny_run, capsys):
  """Samples from the run with flags, as the command does; returns what it printed."""

  def call(*args, expected=0):
    values = flags.FlagValues()
    sample.define_flags(values)
    # The run's task is not the package's own.
    own = [] if any(arg.startswith('--gin_file') for arg in args) else ['--module=tiny_task']
    values(['sample', f'--checkpoint={tiny_run}', *own, *args])
    capsys.readouterr()
    code = sample.run_flags(values)
    out, err = capsys.readouterr()
    assert code == expected, err
    return err if expected else out

  return call


def _shown(text):
  """What the terminal gets of a text: the model has learned little, and writes any bytes."""
  return ''.join(c if c.isprintable() or c in '\n\t' else '\ufffd' for c in text)


def _json(call, *args):
  return [json.loads(line) for line in call('--json=-', *args).splitlines()]


def test_a_text_is_shown_as_it_is_made(call, lm, monkeypatch):
  shown = []
  show = sampling_session._show
  monkeypatch.setattr(
    sampling_session, '_show', lambda text, wanted: shown.append(text) or show(text, wanted)
  )
  out = call(f'--prompt={_PROMPT}', '--max_tokens=20', '--seed=3', '--top_p=0.9')
  state, _ = lm.read(lm.start(), [_PROMPT])
  tokens = lm.generate(state, 20, seed=3, sampling=SamplingConfig(top_p=0.9)).tokens[0]
  assert out == _shown(f'{_PROMPT}{lm.text(tokens)}\n')
  # The prompt, 8 + 8 + 4 tokens, and the end.
  assert shown[0] == _PROMPT
  # Bytes that may begin a character wait for those that end it.
  first = lm.text(tokens[:8])
  assert shown[1] and first.startswith(shown[1]) and len(first) - len(shown[1]) <= 1
  assert len(shown) == 5


def test_samples_of_several_prompts_in_text_and_json(call, tmp_path):
  path = tmp_path / 'samples.jsonl'
  of_the_run = '--gin_bindings=runner.train.sample_cfg = @samples.SampleConfig()'
  args = '--prompt=the', '--prompt=a sea', '--num_samples=2', '--max_tokens=8', '--top_k=5'
  args += (of_the_run,)
  out = call(*args, f'--json={path}')
  records = [json.loads(line) for line in path.read_text().splitlines()]
  assert [(r['prompt'], r['sample']) for r in records] == [
    ('the', 0), ('the', 1), ('a sea', 0), ('a sea', 1),
  ]  # fmt: skip
  texts = [r['prompt'] + r['text'] for r in records]
  assert out == _shown(f'\n{"-" * 80}\n'.join(texts) + '\n')
  assert len(set(texts)) == 4
  for record in records:
    assert len(record['tokens']) == 8 and record['nats'] > 0
    assert (record['top_k'], record['top_p'], record['temperature']) == (5, 0.95, 1.0)
  assert _json(call, *args) == records


def test_without_a_prompt_a_document_begins(call, lm):
  (record,) = _json(call, '--max_tokens=8', '--temperature=0')
  expected = lm.generate(lm.start(), 8, sampling=SamplingConfig(temperature=0.0))
  assert record['tokens'] == expected.tokens[0].tolist()
  assert record['nats'] == pytest.approx(-expected.log_likelihoods.sum(), rel=1e-5)
  assert record['prompt'] is None


def test_a_temperature_that_is_almost_zero(call):
  zero, small = (
    _json(call, f'--prompt={_PROMPT}', '--max_tokens=8', f'--temperature={temperature}')[0]
    for temperature in ('0', '1e-38')
  )
  assert small['tokens'] == zero['tokens']


def test_a_session_in_parts_is_as_whole(call, tmp_path):
  whole = _json(call, f'--prompt={_PROMPT}', '--max_tokens=16', '--num_samples=2')
  state = f'--state_out={tmp_path / "state.npz"}'
  head = _json(call, f'--prompt={_PROMPT[:5]}', '--max_tokens=8', state)
  assert head[0]['tokens']  # Not a part of it.
  call(f'--prompt={_PROMPT[:5]}', '--score', state)
  args = f'--state_in={tmp_path / "state.npz"}', state
  first = _json(call, *args, f'--prompt={_PROMPT[5:]}', '--max_tokens=8', '--num_samples=2')
  second = _json(call, *args, '--max_tokens=8')
  joined = [a['tokens'] + b['tokens'] for a, b in zip(first, second, strict=True)]
  assert joined == [record['tokens'] for record in whole]


def _chooses(monkeypatch, tokens):
  """Makes models write these tokens, whatever they are asked."""
  stream = iter(tokens)

  def generate(self, state, number, seed, sampling):
    part = list(itertools.islice(stream, number))
    rows = [part] * len(state.token)
    state, nats = self.read(state, rows)
    return language_model.Generated(np.array(rows), -np.array(nats), state)

  monkeypatch.setattr(language_model.LanguageModel, 'generate', generate)


@pytest.mark.parametrize('cut', [3, 6, 9])  # Within a character of two bytes, of four; none.
def test_a_character_that_two_sessions_share(call, tmp_path, monkeypatch, cut):
  text = 'na\u00efve \U0001f680!'
  tokens = [value + 3 for value in text.encode()]
  state = tmp_path / 'state.npz'
  heads = ['--num_samples=2', f'--max_tokens={cut}'], ['--score', f'--prompt_file={tmp_path}/head']
  for head in heads:
    (tmp_path / 'head').write_bytes(text.encode()[:cut])
    _chooses(monkeypatch, tokens if '--score' not in head else tokens[cut:])
    first = _json(call, *head, f'--state_out={state}')
    second = _json(call, f'--state_in={state}', f'--max_tokens={len(tokens) - cut}')
    shown = text.encode()[:cut].decode(errors='ignore')
    assert all(record.get('text', shown) == shown for record in first)
    assert {shown + record['text'] for record in second} == {text}
  # Nobody is to continue this one.
  _chooses(monkeypatch, tokens)
  (last,) = _json(call, f'--max_tokens={cut}')
  assert last['text'] == text.encode()[:cut].decode(errors='replace')


def test_a_space_where_a_session_goes_on(call, tmp_path, monkeypatch):
  """The vocabulary puts one before a text, where it is left out, and there it is a real one."""
  pieces = _pieces(tmp_path, add_dummy_prefix=True)
  vocabulary = vocabularies.SentencePieceVocabulary(lambda: str(tmp_path / 'other.model'))
  tokens, state = vocabulary.encode('the sea and'), tmp_path / 'state.npz'
  texts = vocabularies.texts_of_tokens(vocabulary)
  cut = next(i for i, token in enumerate(tokens) if i and texts[token].startswith(b' '))
  _chooses(monkeypatch, tokens)
  (first,) = _json(call, pieces, f'--max_tokens={cut}', f'--state_out={state}')
  (second,) = _json(call, pieces, f'--max_tokens={len(tokens) - cut}', f'--state_in={state}')
  assert (first['text'], second['text']) == ('the', ' sea and')


def test_a_prompt_from_a_file(call, tmp_path):
  path = tmp_path / 'prompt.txt'
  path.write_text(_PROMPT)
  of_file = _json(call, f'--prompt_file={path}', '--max_tokens=8')
  assert of_file[0]['tokens'] == _json(call, f'--prompt={_PROMPT}', '--max_tokens=8')[0]['tokens']
  assert of_file[0]['prompt'] == str(path)
  # It is known already: only what is new is shown.
  out = call(f'--prompt_file={path}', '--max_tokens=8')
  assert out == _shown(of_file[0]['text'] + '\n')


def test_files_in_the_home_folder(call, tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  (tmp_path / 'prompt').write_text(_PROMPT)
  args = '--max_tokens=8', '--state_out=~/state.npz'
  call('--prompt_file=~/prompt', '--json=~/a.jsonl', *args)
  call('--state_in=~/state.npz', '--json=~/b.jsonl', *args)
  for name in ('a', 'b'):
    assert json.loads((tmp_path / f'{name}.jsonl').read_text())['tokens']


def test_what_a_terminal_would_obey_is_not_shown(capsys):
  sampling_session._show('a\x1b[2J\x07\x9bb\tc\n', True)
  assert capsys.readouterr().out == 'a\ufffd[2J\ufffd\ufffdb\tc\n'


def test_what_a_terminal_would_obey_in_a_prompt(call):
  prompt = 'a\x1b[2Jb\x07'
  assert call(f'--prompt={prompt}', '--max_tokens=8').startswith('a\ufffd[2Jb\ufffd')
  assert call(f'--prompt={prompt}', '--score').startswith('a\ufffd[2Jb\ufffd\nnats')
  (record,) = _json(call, f'--prompt={prompt}', '--max_tokens=8')
  assert record['prompt'] == prompt


# Scores


def test_a_score(call, lm, tmp_path):
  expected = lm.score(_PROMPT)
  path = tmp_path / 'score.jsonl'
  out = call('--score', f'--prompt={_PROMPT}', f'--json={path}')
  record = json.loads(path.read_text())
  assert record['nats'] == pytest.approx(expected.total_nats, rel=1e-6)
  assert record['bits_per_byte'] == pytest.approx(expected.bits_per_byte, rel=1e-6)
  assert record['cross_entropy'] == pytest.approx(expected.nats.mean(), rel=1e-5)
  assert record['tokens'] == record['bytes'] == len(_PROMPT)
  head, *lines = out.splitlines()
  assert head == _PROMPT
  assert dict(line.split() for line in lines)['nats'] == f'{expected.total_nats:.4f}'


def test_the_score_of_a_file_of_any_bytes_with_a_line_per_token(call, lm, tmp_path):
  path = tmp_path / 'data'
  path.write_bytes('a \u00e9\n'.encode() + b'\xff')
  tokens = [value + 3 for value in path.read_bytes()]
  expected = lm.score(tokens)
  out = call('--score', '--per_token', f'--prompt_file={path}')
  rows = [line.split(None, 3) for line in out.splitlines()[:6]]
  assert [int(row[0]) for row in rows] == list(range(6))
  assert [int(row[1]) for row in rows] == tokens
  np.testing.assert_allclose([float(row[2]) for row in rows], expected.nats, atol=6e-5)
  assert [row[3] for row in rows] == ["'a'", "' '", "'\\\\xc3'", "'\\\\xa9'", "'\\n'", "'\\\\xff'"]
  assert out.splitlines()[6] == str(path)
  *records, total = _json(call, '--score', '--per_token', f'--prompt_file={path}')
  assert [record['token'] for record in records] == tokens
  assert total['nats'] == pytest.approx(sum(record['nats'] for record in records))


@contextlib.contextmanager
def _pipe(data):
  """The path of a pipe that holds some bytes, which can be read once."""
  reader, writer = os.pipe()
  with open(writer, 'wb') as f:
    f.write(data)
  try:
    yield f'/dev/fd/{reader}'
  finally:
    os.close(reader)


@pytest.mark.parametrize('vocabulary', ['bytes', 'pieces'])
@pytest.mark.parametrize('mode', ['--score', '--temperature=0'])
def test_a_pipe_is_read_as_a_file_is(call, tmp_path, vocabulary, mode):
  text = b'the sea and the sky'
  path = tmp_path / 'text'
  path.write_bytes(text)
  args = [mode, *([_pieces(tmp_path)] if vocabulary == 'pieces' else [])]
  (expected,) = _json(call, f'--prompt_file={path}', *args)
  with _pipe(text) as pipe:
    (found,) = _json(call, f'--prompt_file={pipe}', *args)
  for name in ('prompt', 'seconds'):
    expected.pop(name, None), found.pop(name, None)
  assert found == expected


# Other vocabularies


def _images(tmp_path):
  """A gin file of the same network with images of 2 x 3 pixels."""
  return _other(tmp_path, 'ImageVocabulary', 'vocabularies.ImageVocabulary.shape = (2, 3, 3)')


def _pieces(tmp_path, **changes):
  """The same with pieces of text, and few characters."""
  path = other_sentencepiece_model(tmp_path, byte_fallback=False, vocab_size=60, **changes)
  binding = f"vocabularies.sentencepiece_model.path = '{path}'"
  return _other(tmp_path, 'SentencePieceVocabulary', binding)


def _other(tmp_path, name, binding):
  path = tmp_path / 'other.gin'
  path.write_text(_OTHER_VOCABULARY.format(tiny=_TINY, name=name, binding=binding))
  return f'--gin_file={path}'


def test_images_are_a_png(call, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  of_images = _images(tmp_path)
  of_images = of_images, f'--gin_search_paths={_TESTS.parent}'  # Of what tiny.gin includes.
  out = call(*of_images, '--num_samples=3', '--json=samples.jsonl')
  assert out == 'samples.png\n'
  picture = matplotlib_image.imread('samples.png')
  assert picture.shape[:2] == (2 * 2 + 2, 3 * 2 + 2)  # A grid of 2 x 2, with gaps of 2.
  records = [json.loads(line) for line in pathlib.Path('samples.jsonl').read_text().splitlines()]
  assert [len(record['tokens']) for record in records] == [18] * 3
  values = np.array(records[0]['tokens'][:9]) - 3
  expected = np.where((values >= 0) & (values < 256), values, 0).reshape(3, 3)
  np.testing.assert_array_equal(np.round(picture[0, :3, :3] * 255), expected)
  assert call(*of_images, '--max_tokens=8', '--png=half.png') == 'half.png\n'


def test_pieces(call, tmp_path):
  (record,) = _json(call, _pieces(tmp_path), '--prompt=the sea, a sky', '--max_tokens=8')
  assert len(record['tokens']) == 8
  assert call(_pieces(tmp_path), '--prompt=the sea', '--score').startswith('the sea\nnats ')


def test_settings_that_change_nothing_are_told(call, caplog):
  bindings = (f'--gin_bindings={x}' for x in ('BATCH_SIZE = 0', 'NUM_PARTITIONS = 1'))
  call('--prompt=a', '--max_tokens=8', *bindings)
  told = [r.getMessage() for r in caplog.records if 'changed nothing' in r.getMessage()]
  assert told == ['--gin.BATCH_SIZE=0 changed nothing: leave it out.']


# Refusals


@pytest.mark.parametrize(
  ('args', 'part'),
  [
    (['--checkpoint='], 'no --checkpoint was given: try python -m tvq_t5x.sample'),
    (['--checkpoint=nothing'], '--checkpoint=nothing: there is no such folder'),
    (['--gin_file=nothing.gin'], '--gin_file=nothing.gin: no such file'),
    (['--max_tokens=0'], '--max_tokens=0: give a whole number of at least 1'),
    (['--num_samples=0'], '--num_samples=0: give'),
    (['--temperature=-1'], '--temperature=-1.0: give 0'),
    (['--top_p=0'], '--top_p=0.0: give a share'),
    (['--top_p=1.5'], '--top_p=1.5: give a share'),
    (['--seed=9223372036854775808'], '--seed=9223372036854775808: give a whole number from -'),
    (['--prompt=a\udcff'], '--prompt is no text in UTF-8'),
    (['--prompt=a\udcff', '--score'], '--prompt is no text in UTF-8'),
    (['--top_k=-1'], '--top_k=-1: give 0'),
    (['--prompt_file=nothing.txt'], '--prompt_file=nothing.txt: there is no such file'),
    (['--prompt=a', f'--prompt_file={_TINY}'], '--prompt and --prompt_file: give one'),
    (['--state_in=nothing.npz'], '--state_in=nothing.npz: there is no such file'),
    (['--state_out=nowhere/state.npz'], '--state_out=nowhere/state.npz: there is no folder'),
    (['--json=nowhere/a'], '--json=nowhere/a: there is no folder'),
    (['--png=a.png'], '--png: the task is not one of images'),
    (['--score'], '--score: say what to score'),
    (['--per_token', '--prompt=a'], '--per_token is a table of --score'),
    (
      ['--score', '--prompt=a', '--prompt=b', '--state_out=state.npz'],
      '--state_out with --score: give one prompt',
    ),
    (['--gin_bindings=config.TransformerConfig.emb_dim = 32'], 'there [1, 16, 1, 8]'),
    *(
      (['--score', '--prompt=a', flag], f'{flag.split("=")[0]}: --score continues no text; leave')
      for flag in (
        '--seed=0', '--temperature=1', '--top_p=1', '--top_k=0', '--num_samples=1',
        '--max_tokens=256', '--png=a.png',
      )
    ),
    *(
      (['--temperature=0', flag], f'{flag.split("=")[0]}: temperature 0 takes the likeliest token')
      for flag in ('--seed=1', '--top_p=0.9', '--top_k=3')
    ),
    (['--gin_search_paths=no', f'--gin_file={_TINY}'], '--gin_search_paths=no: there is no such'),
    (['--gin_search_paths=.'], '--gin_search_paths=.: the config.gin in MODEL_DIR includes no'),
    (['--module=nope'], '--module=nope: there is no such module'),
    (['--temperature=inf'], '--temperature=inf: give 0'),
    ([f'--prompt_file={pathlib.Path(_TINY).parent}'], 'is a folder: give a file'),
    (['--module=tiny_task', f'--gin_file={_TINY}'], '--module=tiny_task is for the config.gin in'),
  ],
)  # fmt: skip
def test_mistakes_are_one_line(call, compiled, args, part):
  message = call(*args, expected=2)
  assert message.startswith('error: ') and part in message
  assert len(message.splitlines()) == 1
  assert not compiled


def test_prompts_outside_the_vocabulary(call, compiled, tmp_path):
  prompt = tmp_path / 'prompt.txt'
  prompt.write_text('the \u65e5')
  for source, given in (('--prompt', '--prompt=the \u65e5'), (f'--prompt_file={prompt}',) * 2):
    message = call(_pieces(tmp_path), given, expected=2)
    assert message.startswith(f"error: {source}: the vocabulary has no piece for '\u65e5'")
    assert len(message.splitlines()) == 1
  assert not compiled


@pytest.mark.parametrize(
  'args', [['--prompt=a'], ['--prompt=a', '--score'], [f'--prompt_file={_TINY}']]
)
def test_images_have_no_prompt(call, compiled, tmp_path, args):
  message = call(_images(tmp_path), *args, expected=2)
  assert 'images are made from the first pixel on' in message
  assert not compiled


def test_an_empty_text_has_no_score(call, tmp_path):
  (tmp_path / 'empty').write_text('')
  for args in ([f'--prompt_file={tmp_path / "empty"}'], ['--prompt=']):
    assert 'there is no text to score' in call('--score', *args, expected=2)


def test_prompts_that_do_not_match_the_state(call, tmp_path):
  state = tmp_path / 'state.npz'
  call('--num_samples=3', '--max_tokens=8', f'--state_out={state}')
  message = call('--prompt=a', '--prompt=b', f'--state_in={state}', expected=2)
  assert '--state_in has 3 sequences; give one prompt for all, or 3' in message
  message = call('--score', '--prompt=a', f'--state_in={state}', expected=2)
  assert '--state_in has 3 sequences' in message


def test_the_state_of_another_checkpoint(call, tiny_run, tmp_path):
  state = tmp_path / 'state.npz'
  call('--max_tokens=8', f'--state_out={state}')
  message = call(f'--checkpoint={tiny_run / "checkpoint_8"}', f'--state_in={state}', expected=2)
  assert 'can not be continued with the parameters of' in message
