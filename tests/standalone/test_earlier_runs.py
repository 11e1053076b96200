"""What an earlier version of the package wrote is read as it was then."""

import json
import pathlib
import zipfile

import numpy as np
import pytest
from mesh_util import assert_same_numbers, by_name, on_host
from util import one_device

from tvq_t5x import evaluate, train
from tvq_t5x.checkpoints import layout
from tvq_t5x.standalone import configuration

_FOLDER = pathlib.Path(__file__).parents[1] / 'earlier'
# Of the evaluation that the earlier version printed.
_EXPECTED = {'cross_entropy': 1.1236350541105289, 'accuracy': 0.656686626746507}
pytestmark = pytest.mark.usefixtures('cleared_gin')


@pytest.fixture
def earlier(tmp_path):
  """MODEL_DIR of 16 of 24 steps of tests/tiny.gin, with MHA and a state that is carried on."""
  with zipfile.ZipFile(_FOLDER / 'run.zip') as archive:
    archive.extractall(tmp_path)
  return tmp_path


def test_a_checkpoint_is_evaluated_by_its_own_configuration(earlier, capsys):
  with one_device():
    assert (
      evaluate.run([], checkpoint=str(earlier), split='test', json_file='-', modules=['tiny_task'])
      == 0
    )
  found = json.loads(capsys.readouterr().out)
  for name, value in _EXPECTED.items():
    np.testing.assert_allclose(found[name], value, rtol=1e-5)


@pytest.mark.slow
def test_a_run_goes_on_to_the_same_parameters(earlier):
  """But for dropout, whose masks are others now: eight updates of a thousandth each."""
  with one_device():
    assert train.run([str(earlier / 'config.gin')], [f"MODEL_DIR = '{earlier}'"]) == 0
    found = configuration.load(str(earlier), modules=['tiny_task']).params
  assert layout.steps_in(earlier)[-1] == 24
  expected = dict(np.load(_FOLDER / 'params_24.npz'))
  assert_same_numbers(on_host(by_name(found)), expected, 0.05)
