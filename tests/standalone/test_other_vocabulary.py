"""A run, its checkpoints and states belong to a vocabulary, wherever its file lies."""

import copy
import dataclasses
import logging
import pathlib
import shutil

import gin
import pytest
from data_util import two_sentencepiece_models
from util import one_device

from tvq_t5x import evaluate, sample, train
from tvq_t5x.checkpoints import layout
from tvq_t5x.common.errors import ConfigError
from tvq_t5x.data import vocabularies
from tvq_t5x.generation import language_model

_TINY = str(pathlib.Path(__file__).parents[1] / 'tiny.gin')
pytestmark = pytest.mark.usefixtures('logged')


def _train(folder, model, files=(), dry_run=False, **macros):
  macros = {
    'MODEL_DIR': str(folder),
    'MIXTURE_OR_TASK_NAME': 'tiny_pieces',
    'VOCAB_SIZE': 304,
    'TRAIN_STEPS': 4,
    'WARMUP_STEPS': 2,
    **macros,
  }
  settings = [f'{name} = {value!r}' for name, value in macros.items()]
  settings.append('runner.train.sample_cfg = None')
  with pytest.MonkeyPatch.context() as patch, one_device():
    patch.setenv('SENTENCEPIECE_MODEL', model)
    return train.run([_TINY, *files], settings, dry_run=dry_run)


@pytest.fixture(scope='module')
def models(tmp_path_factory):
  """Files of two vocabularies of the same size."""
  return two_sentencepiece_models(tmp_path_factory.mktemp('models'))


@pytest.fixture(scope='module')
def trained(tmp_path_factory, models):
  """MODEL_DIR of a short run with the first vocabulary."""
  folder = tmp_path_factory.mktemp('pieces') / 'run'
  assert _train(folder, models[0]) == 0
  gin.clear_config()
  return folder


def _assert_told(message, models):
  ours, theirs = (
    vocabularies.identity(vocabularies.SentencePieceVocabulary(lambda path=path: path))
    for path in models[::-1]
  )
  assert ours != theirs
  assert 'TransformerVQModel.vocabulary' in message and f' is {ours} ' in message
  assert f'there {theirs}' in message and 'SENTENCEPIECE_MODEL' in message
  assert len(message.splitlines()) == 1


@pytest.mark.parametrize('by_t5x', [False, True])
def test_the_run_does_not_go_on(trained, models, tmp_path, capsys, by_t5x):
  folder = shutil.copytree(trained, tmp_path / 'run')
  if by_t5x:  # Which has no such metadata.
    for path in folder.glob(f'checkpoint_*/{layout.METADATA}'):
      shutil.rmtree(path)
  assert _train(folder, models[1], TRAIN_STEPS=8) == 2
  _assert_told(capsys.readouterr().err, models)
  assert layout.steps_in(folder) == [4]


def test_a_copy_of_the_vocabulary_is_the_same_one(trained, models, tmp_path):
  path = str(shutil.copy(models[0], tmp_path / 'moved.model'))
  assert _train(shutil.copytree(trained, tmp_path / 'run'), path) == 0


@pytest.mark.parametrize('command', ['evaluate', 'sample', 'score'])
def test_its_parameters_are_not_used(trained, models, capsys, monkeypatch, compiled, command):
  monkeypatch.setenv('SENTENCEPIECE_MODEL', models[1])
  kwargs = {'checkpoint': str(trained), 'modules': ['tiny_task']}
  if command == 'evaluate':
    assert evaluate.run([], **kwargs) == 2
  else:
    options = sample.Options(prompt=['the sea'], score=command == 'score')
    assert sample.run([], [], [], options=options, **kwargs) == 2
  message = capsys.readouterr().err
  _assert_told(message, models)
  assert f'--checkpoint={trained / "checkpoint_4"}' in message
  assert not compiled


def test_fine_tuning_says_so(trained, models, tmp_path, caplog):
  files, macros = ['gin/runs/finetune.gin'], {'INITIAL_CHECKPOINT_PATH': str(trained)}
  macros = {**macros, 'TRAIN_STEPS': 8, 'LEARNING_RATE': 1e-3}
  for model, told in zip(models, (False, True), strict=True):
    caplog.clear()
    assert _train(tmp_path / 'run', model, files, dry_run=True, **macros) == 0
    messages = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    messages = [message for message in messages if 'vocabulary' in message]
    assert len(messages) == told
    for message in messages:
      _assert_told(message, models)


def test_a_state_is_not_continued(trained, models, tmp_path, monkeypatch):
  monkeypatch.setenv('SENTENCEPIECE_MODEL', models[0])
  lm = language_model.load(str(trained), modules=['tiny_task'])
  lm.save_state(tmp_path / 'state.npz', lm.start())
  model = copy.copy(lm.loaded.model)
  model.output_vocabulary = vocabularies.SentencePieceVocabulary(lambda: models[1])
  other = language_model.LanguageModel(dataclasses.replace(lm.loaded, model=model))
  with pytest.raises(ConfigError) as error:
    other.load_state(tmp_path / 'state.npz')
  _assert_told(str(error.value), models)
