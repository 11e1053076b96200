"""T5X's evaluation, inference and export refuse what gin lets pass, before anything is compiled."""

import pytest

pytest.importorskip('t5x.eval', reason='T5X is not installed: its refusals')

import t5x_runs

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.t5x_adapter import paths

_MESH = 'gin/mesh/v3_8.gin'
# By program: its function, files, and settings that it requires, in the folder to be written.
_PROGRAMS = {
  'eval': ('evaluate', ['gin/runs/eval.gin', _MESH], 'EVAL_OUTPUT_DIR'),
  'infer': ('infer', ['gin/runs/infer.gin', _MESH], 'INFER_OUTPUT_DIR'),
  'export_lib': ('save', ['gin/runs/export.gin'], 'MODEL_OUTPUT_DIR'),
}


def _start(program, folder, *settings):
  function, files, output = _PROGRAMS[program]
  given = {'CHECKPOINT_PATH': str(folder / 'nothing'), output: str(folder / 'out')}
  if program == 'export_lib':
    given = {**given, output: {'cpu': str(folder / 'out')}, 'MODEL_NAME': 'tiny'}
  settings = [*t5x_runs.bindings(**given), *settings]
  t5x_runs.run(program, function, [*files, t5x_runs.TINY_MODEL], settings)


@pytest.mark.parametrize('program', _PROGRAMS)
@pytest.mark.parametrize(
  ('setting', 'parts'),
  [
    ('BATCH_SZIE = 8', ['BATCH_SZIE', 'did you mean BATCH_SIZE']),
    ('chekpoint/paths.trained.path = "x"', ['chekpoint', 'did you mean checkpoint']),
    ("VOCAB_SIZE = '264'", ['TransformerConfig.vocab_size', 'VOCAB_SIZE', 'accepts int']),
    ('CHECKPOINT_PATH = %gin.REQUIRED', ['CHECKPOINT_PATH', '--gin.CHECKPOINT_PATH=']),
    ('CHECKPOINT_PATH = %PATH', ['%PATH is used by CHECKPOINT_PATH', '--gin.PATH=']),
  ],
  ids=['macro', 'scope', 'type', 'required', 'unset'],
)
def test_mistakes_are_refused(tmp_path, compiled, program, setting, parts):
  with pytest.raises(ConfigError) as error:
    _start(program, tmp_path, setting)
  assert '\n' not in str(error.value)
  for part in parts:
    assert part in str(error.value)
  assert not compiled and not list(tmp_path.iterdir())


@pytest.mark.parametrize('path', ['runs/a[1]', '/runs/b*', 'gs://bucket/what?'])
def test_folders_that_t5x_takes_for_patterns_are_refused(path):
  with pytest.raises(ConfigError, match='could not be read again'):
    paths.absolute(path)
  assert paths.absolute('/runs/{a}$b') == '/runs/{a}$b'
