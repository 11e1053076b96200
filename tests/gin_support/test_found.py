"""A configuration that lies beside a checkpoint runs nothing but what a run needs."""

import pathlib
import shutil

import pytest
from util import one_device

from tvq_t5x import evaluate
from tvq_t5x.common.errors import ConfigError
from tvq_t5x.generation import language_model
from tvq_t5x.gin_support import found, parsing

_DYNAMIC = 'from __gin__ import dynamic_registration\n'
_ACCEPTED = (
  _DYNAMIC
  + """
from tvq_t5x.data import classification
from tvq_t5x.data import datasets
from tvq_t5x.network import config
from tvq_t5x.standalone import runner
from tvq_t5x.tasks import enwik8
from tvq_t5x.training import optimizers

TRAIN_STEPS = 3
OPTIMIZER = @optimizers.adamw()
MODULE = 'tvq_t5x.tasks.enwik8'
runner.train.total_steps = %TRAIN_STEPS
train/datasets.DatasetConfig.module = %MODULE
datasets.vocabulary.module = None
enwik8.corpus.path = None
config.TransformerConfig:
  sublayers = ['vq', 'mlp']
"""
)
# What is refused, and the module that would allow it.
_REFUSED = {
  'import os': 'os',
  'import os.path': 'os.path',
  'from os import path': 'os.path',
  "include 'other.gin'": None,
  'A = @os.system()': 'os',
  'A = [{"b": (@datasets.task_or_mixture(),)}]': 'tvq_t5x.data.datasets',
  'config.TransformerConfig.dtype = @config.dataclasses.sys.exit()': 'tvq_t5x.network.config',
  'config.dataclasses.sys.exit.status = 3': 'tvq_t5x.network.config',
  'runner.train.sample_cfg = @runner.train()': 'tvq_t5x.standalone.runner',
  'from tvq_t5x.common import files': 'tvq_t5x.common.files',
  'from tvq_t5x.standalone import samples as runner': None,
  "datasets.vocabulary.module = 'this'": 'this',
  "classification.task_format.module = 'this'": 'this',
  "MODULE = 'this'": 'this',
  'datasets.vocabulary.module = %OTHER\nOTHER = %MODULE\nMODULE = "this"': 'this',
  "datasets.vocabulary.module = %a/OTHER\na/OTHER = 'this'": 'this',
  "datasets.vocabulary.module = %OTHER\nOTHER/gin.macro.value = 'this'": None,
  "datasets.vocabulary.module = %OTHER\nOTHER/gin.macro:\n  value = 'this'": None,
  'datasets.vocabulary.module = %UNSET': None,
  'datasets.vocabulary.module = @MODULE/gin.macro()': None,
  'from tvq_t5x import tasks': 'tvq_t5x.tasks',
  'enwik8.zipfile.ZipFile.file = "x"': 'tvq_t5x.tasks.enwik8',
}


def test_what_a_run_needs_is_accepted():
  found.check(_ACCEPTED, 'config.gin')


@pytest.mark.parametrize(
  'path', sorted(pathlib.Path(parsing.gin_root()).glob('*.gin')), ids=lambda path: path.stem
)
def test_what_a_run_leaves_is_accepted(path, cleared_gin):
  parsing.parse_gin([str(path)], ["MODEL_DIR = 'run'"])
  found.check(parsing.config_str(), 'config.gin')


@pytest.mark.parametrize('text', _REFUSED)
def test_all_else_is_refused_with_the_flag_that_allows_it(text):
  module = _REFUSED[text]
  with pytest.raises(ConfigError, match='config.gin: .* is refused.*--gin_file') as error:
    found.check(f'{_ACCEPTED}{text}\n', 'config.gin')
  assert (f'--module={module}.' in str(error.value)) == (module is not None)
  if module is not None:
    found.check(f'{_ACCEPTED}{text}\n', 'config.gin', [module])


@pytest.mark.parametrize('text', ['A = (', 'import', 'A = @', '\0', 'A == 3'])
def test_what_is_no_gin_is_refused(text):
  with pytest.raises(ConfigError, match='config.gin is no configuration of a run'):
    found.check(f'{_ACCEPTED}{text}', 'config.gin')


def test_a_checkpoint_from_elsewhere_executes_nothing(
  tiny_run, tmp_path, monkeypatch, capsys, cleared_gin
):
  folder, mark = tmp_path / 'downloaded', tmp_path / 'mark'
  shutil.copytree(tiny_run, folder)
  (tmp_path / 'evil.py').write_text(f'import pathlib\npathlib.Path({str(mark)!r}).touch()\n')
  monkeypatch.syspath_prepend(tmp_path)
  path = folder / 'config.gin'
  path.write_text(path.read_text().replace(_DYNAMIC, f'{_DYNAMIC}import evil\n'))
  with one_device():
    assert evaluate.run([], checkpoint=str(folder), modules=['tiny_task']) == 2
    assert '`import evil` is refused' in capsys.readouterr().err
    with pytest.raises(ConfigError, match='`import evil` is refused'):
      language_model.load(str(folder), modules=['tiny_task'])
    assert not mark.exists()
    language_model.load(str(folder), modules=['tiny_task', 'evil'])
  assert mark.exists()
