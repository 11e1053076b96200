"""Tasks and mixtures by their names."""

import difflib
import importlib

import seqio

from tvq_t5x.common import errors


def task_or_mixture(
  name: str | seqio.Task | seqio.Mixture, module: str | None
) -> seqio.Task | seqio.Mixture:
  """Returns the task or mixture of this name, once a module is imported.

  Args:
    name: of a registered one; or one itself, which is returned.
    module: what to import first; None means nothing.

  Raises:
    ConfigError: if there is no such module, or none has this name.
  """
  if module:
    import_tasks(module, 'DatasetConfig.module')
  if not isinstance(name, str):
    return name
  names = sorted({*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()})
  if name in names:
    return seqio.get_mixture_or_task(name)
  near = difflib.get_close_matches(name, names) or names[:10]
  known = f'registered: {", ".join(near)}' if near else 'none is registered'
  raise errors.ConfigError(
    f'DatasetConfig.mixture_or_task_name = {name!r}: no task or mixture has this name; {known}. '
    f'DatasetConfig.module = {module!r} must name the module that registers it, such as '
    "'tvq_t5x.tasks.kjv'."
  )


def import_tasks(module: str, setting: str) -> None:
  """Imports a module that registers tasks.

  Args:
    module: its name.
    setting: where it comes from, for the message.

  Raises:
    ConfigError: if there is no such module.
  """
  try:
    importlib.import_module(module)
  except ModuleNotFoundError as e:
    if not e.name or not f'{module}.'.startswith(f'{e.name}.'):
      raise  # The module exists, something that it imports does not.
    raise errors.ConfigError(
      f'{setting} = {module!r}: there is no module {e.name!r}; give the import path of the module '
      "that registers the task, such as 'tvq_t5x.tasks.kjv'."
    ) from e
