"""LongVQ in a run: it trains, goes on after an interruption, is evaluated and samples."""

import json
import pathlib

import numpy as np
import pytest
from util import one_device

from tvq_t5x import evaluate, train
from tvq_t5x.checkpoints import layout
from tvq_t5x.generation import language_model
from tvq_t5x.network.sampling import SamplingConfig

ROOT = pathlib.Path(__file__).parents[2]
FILES = [str(ROOT / 'tests' / 'tiny.gin'), str(ROOT / 'gin' / 'models' / 'longvq.gin')]
# Short segments and chunks, so that the state goes through many of both.
SETTINGS = {
  'TRAIN_STEPS': 8,
  'CHECKPOINT_PERIOD': 4,
  'EVAL_PERIOD': 8,
  'SAMPLE_PERIOD': 8,
  'CARRY_STATE': True,
  'longvq.LongVQ.state_size': 4,
  'optimizers.warmup_cosine.total_steps': 8,
  'longvq.LongVQ.chunk_len': 12,
  'config.TransformerConfig.codes_from_keys': True,
  'config.TransformerConfig.replace_below': 0.5,
}
pytestmark = pytest.mark.usefixtures('cleared_gin')


def run(folder, **settings):
  settings = {**SETTINGS, 'MODEL_DIR': str(folder), **settings}
  with one_device():
    assert train.run(FILES, [f'{name} = {value!r}' for name, value in settings.items()]) == 0


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  folder = tmp_path_factory.mktemp('longvq') / 'run'
  run(folder)
  return folder


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_numbers(whole, tmp_path):
  for steps in (4, 8):
    run(tmp_path / 'run', TRAIN_STEPS=steps)
  found = [layout.read_metadata(layout.folder(f, 8)) for f in (whole, tmp_path / 'run')]
  assert found[0]['checksums'] == found[1]['checksums']
  assert found[0]['model']['sublayers'] == [{'longvq': {'state_size': 4}}, 'mlp']


@pytest.mark.parametrize('carry_state', [False, True])
def test_it_is_evaluated_by_its_own_configuration(whole, capsys, carry_state):
  with one_device():
    args = {'checkpoint': str(whole), 'split': 'test', 'json_file': '-', 'modules': ['tiny_task']}
    assert evaluate.run([], carry_state=carry_state, **args) == 0
  found = json.loads(capsys.readouterr().out)
  if not carry_state:
    records = [json.loads(line) for line in (whole / 'metrics.jsonl').read_text().splitlines()]
    expected = next(r for r in records if r['split'] == 'test')
    np.testing.assert_allclose(found['cross_entropy'], expected['cross_entropy'], rtol=1e-5)
  assert found['tokens'] == 501


def test_text_is_continued_as_it_is_scored(whole):
  with one_device():
    lm = language_model.load(str(whole), modules=['tiny_task'])
    state, _ = lm.read(lm.start(), ['the sea and the '])
    generated = lm.generate(state, 20, sampling=SamplingConfig(temperature=0))
    score = lm.score(generated.tokens[0], state)
  np.testing.assert_allclose(score.nats, -generated.log_likelihoods[0], atol=1e-4, rtol=1e-4)
