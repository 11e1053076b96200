"""Who may import whom: folders import downwards, wherever in a file the import stands."""

import ast
import functools
import pathlib
import subprocess
import sys
from collections.abc import Mapping

import pytest

import tvq_t5x

pytestmark = pytest.mark.quick

_ROOT = pathlib.Path(__file__).parents[1]
_COMMANDS = 'the commands'  # The modules beside the folders, such as `tvq_t5x/train.py`.

# A folder imports what stands in lower lines, and nothing of the others in its own.
_FLOORS = (
  (_COMMANDS,),
  ('commands',),
  ('generation', 'planning', 'interop'),
  ('standalone', 't5x_adapter'),
  ('checkpoints',),
  ('training', 'tasks'),
  ('network', 'data'),
  ('gin_support',),
  ('common',),
)
_FLOOR = {room: floor for floor, rooms in enumerate(_FLOORS) for room in rooms}
# What the modules of a folder do without, and so all that they import; but only `gin_support` knows
# gin, and stands between it and those that import `gin_support`.
_DOES_WITHOUT = {
  'network': {'gin', 'seqio', 'tensorflow', 'tensorflow_datasets', 't5x'},
  'data': {'gin', 't5x'},
  'training': {'gin', 't5x'},
  'checkpoints': {'gin', 't5x'},
  'standalone': {'t5x'},
  'interop': {'t5x'},
}


# Code of PyTorch models, which is copied into folders and imported there.
_NOT_OURS = 'interop.hugging_face.'


def _find_modules() -> dict[str, pathlib.Path]:
  """All modules by their names in the package, such as 'network.config'; not its `__init__`."""
  found = {}
  for top, prefix in (('tvq_t5x', ()), ('tasks', ('tasks',))):
    for path in (_ROOT / top).rglob('*.py'):
      parts = prefix + path.relative_to(_ROOT / top).with_suffix('').parts
      found['.'.join(parts).removesuffix('__init__').removesuffix('.')] = path
  del found['']
  return {name: path for name, path in found.items() if not name.startswith(_NOT_OURS)}


_MODULES = _find_modules()


def _room(module: str) -> str:
  return _COMMANDS if _MODULES[module].parent == _ROOT / 'tvq_t5x' else module.partition('.')[0]


def _names(path: pathlib.Path) -> set[str]:
  """All that a file imports, such as 'jax.numpy' and 'tvq_t5x.network.config.Remat'."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}: a relative import'
      found |= {f'{node.module}.{alias.name}' for alias in node.names}
  return found


@functools.cache
def _imports(module: str) -> frozenset[str]:
  """The modules of this package that a module imports."""
  found = set()
  for name in _names(_MODULES[module]):
    package, _, inside = name.partition('.')
    if package == 'tvq_t5x':
      found.add(inside if inside in _MODULES else inside.rpartition('.')[0])
  return frozenset(found)


@functools.cache
def _reached(module: str) -> frozenset[str]:
  """A module, and all of this package that it imports, directly or not."""
  found, new = set(), {module}
  while new:
    found |= new
    new = {name for found_now in new for name in _imports(found_now)} - found
  return frozenset(found)


def _longest_chain(imports: Mapping[str, set[str]]) -> list[str]:
  """Of folders, each of which imports the next."""

  @functools.cache
  def below(room: str) -> tuple[str, ...]:
    return (room, *max(map(below, imports[room]), key=len, default=()))

  return list(max(map(below, imports), key=len))


def test_modules_import_their_own_folder_and_lower_ones():
  for module in _MODULES:
    room = _room(module)
    for other in _imports(module):
      assert other in _MODULES, f'{module} imports {other or "the public names"}'
      assert _room(other) == room or _FLOOR[_room(other)] > _FLOOR[room], f'{module} > {other}'


def test_nobody_imports_the_t5x_adapter():
  for module in _MODULES:
    adapter = {name for name in _imports(module) if _room(name) == 't5x_adapter'}
    assert not adapter or _room(module) == 't5x_adapter', f'{module} imports {adapter}'


def test_no_module_imports_itself_in_a_circle():
  for module in _MODULES:
    for other in _imports(module):
      assert module not in _reached(other), f'{module} and {other} import each other'


def test_a_chain_of_folders_has_at_most_nine():
  rooms = {
    room: {_room(name) for x in _MODULES if _room(x) == room for name in _imports(x)} - {room}
    for room in _FLOOR
  }
  chain = _longest_chain(rooms)
  assert len(chain) <= 9, ' > '.join(chain)


@pytest.mark.parametrize('room', sorted(_DOES_WITHOUT))
def test_a_folder_does_without_packages_that_are_not_its_business(room):
  for module in _MODULES:
    for name in _reached(module) if _room(module) == room else ():
      used = {x.partition('.')[0] for x in _names(_MODULES[name])} & _DOES_WITHOUT[room]
      if _room(name) == 'gin_support' and room != 'network':
        used -= {'gin'}
      assert not used, f'{module} imports {name}, which imports {used}'


@pytest.mark.parametrize(
  'program',
  [
    'import tvq_t5x; tvq_t5x.TransformerConfig',
    f'from tvq_t5x import {", ".join(tvq_t5x.__all__)}',
  ],
)
def test_public_names_are_there_without_tensorflow(program):
  heavy = "[x for x in ('tensorflow', 'seqio', 'gin') if x in sys.modules]"
  done = subprocess.run(
    [sys.executable, '-c', f'import sys; {program}; print({heavy})'],
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout == '[]\n'


def test_public_names_are_those_of_their_modules():
  from tvq_t5x.generation import language_model
  from tvq_t5x.network import config, sampling, transformer
  from tvq_t5x.standalone import run
  from tvq_t5x.train import train_model
  from tvq_t5x.training import models

  assert tvq_t5x.Run is run.Run
  assert tvq_t5x.train_model is train_model
  assert tvq_t5x.load is language_model.load
  assert tvq_t5x.SamplingConfig is sampling.SamplingConfig
  assert tvq_t5x.Transformer is transformer.Transformer
  assert tvq_t5x.TransformerConfig is config.TransformerConfig
  assert tvq_t5x.TransformerVQModel is models.TransformerVQModel
  assert set(tvq_t5x.__all__) <= set(dir(tvq_t5x))
  with pytest.raises(AttributeError, match='no attribute .Transformers'):
    tvq_t5x.Transformers  # noqa: B018
