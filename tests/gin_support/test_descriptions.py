"""The settings that a run's optimizer is built with."""

import pathlib

import pytest

from tvq_t5x.gin_support import descriptions, parsing
from tvq_t5x.training.models import TransformerVQModel

_TINY = str(pathlib.Path(__file__).parents[1] / 'tiny.gin')
pytestmark = [pytest.mark.quick, pytest.mark.usefixtures('cleared_gin')]


def _described(tmp_path, *lines):
  path = tmp_path / 'more.gin'
  imports = 'from __gin__ import dynamic_registration\nfrom tvq_t5x.training import optimizers\n'
  path.write_text(imports + '\n'.join(lines))
  parsing.parse_gin([_TINY, str(path)], ["MODEL_DIR = 'x'"])
  return descriptions.of_parameter(TransformerVQModel, 'optimizer')


def test_what_is_bound_and_what_holds_by_default(tmp_path):
  assert _described(tmp_path) == {
    'TransformerVQModel.optimizer': '@optimizers.adamw()',
    'adamw.learning_rate': '@optimizers.warmup_cosine()',
    'warmup_cosine.peak': 0.01,
    'warmup_cosine.warmup_steps': 4,
    'warmup_cosine.total_steps': 40,
    'warmup_cosine.final_share': 0.1,
    'adamw.b1': 0.9,
    'adamw.b2': 0.98,
    'adamw.eps': 1e-9,
    'adamw.weight_decay': 0.0,
    'adamw.clip_norm': 1.0,
    'adamw.decay_follows_rate': False,
  }


def test_scopes_have_their_own(tmp_path):
  found = _described(
    tmp_path,
    'LEARNING_RATE = @late/optimizers.warmup_cosine()',
    'late/optimizers.warmup_cosine.peak = 0.5',
  )
  assert found['late/warmup_cosine.peak'] == 0.5
  assert found['late/warmup_cosine.warmup_steps'] == 4
  assert 'warmup_cosine.peak' not in found


def test_a_constant_is_none_of_a_schedule(tmp_path):
  found = _described(tmp_path, 'LEARNING_RATE = 1e-4')
  assert found['adamw.learning_rate'] == 1e-4
  assert not any('warmup_cosine' in name for name in found)
