"""`text`: texts of your own, byte by byte or in SentencePiece's pieces; docs/own_data.md.

Files, folders, patterns, a data set of Hugging Face on disk, or a dataset of TFDS. Tokens are made
once, in constant memory, and kept in a token cache.
"""

import os
from collections.abc import Sequence

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.data import corpora, locations, text_corpus, text_files, text_task
from tvq_t5x.data.text_corpus import SPLITS, TextCorpus
from tvq_t5x.gin_support.configurables import configurable

_MACRO = 'TEXT_FILES'
_MACROS = dict(zip(SPLITS, (_MACRO, 'TEXT_VALIDATION_FILES', 'TEXT_TEST_FILES'), strict=True))
_OF_TFDS = 'TFDS_DATA_DIR'

Names = str | Sequence[str]


@configurable
def corpus(
  files: Names | None = None,
  validation_files: Names | None = None,
  test_files: Names | None = None,
  documents: str | None = None,
  field: str = 'text',
  hold_out: str | None = None,
  share: float = 0.05,
  tfds: str | None = None,
) -> TextCorpus:
  """Which texts there are, and which of them train.

  Args:
    files: paths of files or folders, or patterns, one or a list; macro TEXT_FILES. None means the
      environment variable TEXT_FILES, or else the folder or file of --data_dir.
    validation_files: likewise, to validate with; macro TEXT_VALIDATION_FILES. None means a share of
      `files`.
    test_files: likewise, to test with; macro TEXT_TEST_FILES.
    documents: 'files', 'lines' or 'records'; macro TEXT_DOCUMENTS. None means records where there
      are, or else files.
    field: of a record that is its text; macro TEXT_FIELD.
    hold_out: 'documents' or 'ends'; macro TEXT_HOLD_OUT. None means the ends of files, if they are
      documents and fewer than 200, or else documents.
    share: of the text that is held out for each split without files; macro TEXT_HELD_OUT_SHARE.
    tfds: name of a dataset that TFDS has prepared, in place of files; macro TEXT_TFDS.

  Raises:
    ConfigError: for a setting that is not accepted, or files that are not there.
  """
  rules = {'documents': documents, 'field': field, 'hold_out': hold_out, 'share': share}
  given = {'train': files, 'validation': validation_files, 'test': test_files}
  if tfds is not None:
    if set_too := [_MACROS[split] for split, names in given.items() if names]:
      raise ConfigError(f'TEXT_TFDS = {tfds!r}: leave {" and ".join(set_too)} out.')
    return _of_tfds(tfds, rules)
  if not files:
    found = locations.data_path(_MACRO, None)
    if found is None:
      raise ConfigError(
        f'{_MACRO} is not set: give your texts with {locations.how_to_set_data(_MACRO)}: a file, a '
        'folder, or a pattern.'
      )
    given['train'] = found
  names = {split: _listed(x, _MACROS[split]) for split, x in given.items() if x}
  return _of_files(_with_folders_of_splits(names), rules)


def _listed(names: Names, macro: str) -> list[str]:
  found = [names] if isinstance(names, str) else list(names)
  if not all(isinstance(name, str) and name for name in found):
    raise ConfigError(f'{macro} = {names!r} is not accepted: give paths or patterns.')
  return found


def _with_folders_of_splits(names: dict[str, list[str]]) -> dict[str, list[str]]:
  """Names, where a folder with folders `train` and `validation` or `test` stands for these."""
  found: dict[str, list[str]] = {split: [] for split in names}
  for name in names['train']:
    below = {split: os.path.join(os.path.expanduser(name), split) for split in SPLITS}
    there = [split for split, path in below.items() if os.path.isdir(path)]
    if 'train' not in there or len(there) == 1:
      found['train'].append(name)
      continue
    for split in there:
      if split not in names or split == 'train':
        found.setdefault(split, []).append(below[split])
    text_task.tell_once(f'{name}: its folders {", ".join(there)} are the splits.')
  return {**names, **found, **{split: names[split] for split in names if split != 'train'}}


def _of_files(names: dict[str, list[str]], rules: dict) -> TextCorpus:
  sources = {}
  for split in names:
    found = text_files.find(names[split], _MACROS[split])
    sources[split] = found.files
    if found.others:
      text_task.tell_once(
        f'{_MACROS[split]}: {len(found.others):,} files of other kinds are not read, such as '
        f'{found.others[0]}; name them, or a pattern, to read them as text.'
      )
  held_out = {os.path.realpath(x.path) for split in SPLITS[1:] for x in sources.get(split, ())}
  train = [x for x in sources['train'] if os.path.realpath(x.path) not in held_out]
  if held := len(sources['train']) - len(train):
    text_task.tell_once(f'{_MACRO}: {held:,} files are of another split, and do not train.')
  sources['train'] = train
  folders = {os.path.dirname(os.path.abspath(x.path)) for found in sources.values() for x in found}
  shared = os.path.commonpath(folders)
  # Nobody's tokens belong into the root of all files.
  folder = min(folders) if shared == os.path.dirname(shared) else shared
  return TextCorpus(folder, sources, **rules)


def _of_tfds(name: str, rules: dict) -> TextCorpus:
  data_dir = locations.data_path(_OF_TFDS, None)
  everything = corpora.TfdsCorpus(
    name, rules['field'], {split: split for split in SPLITS}, data_dir, _OF_TFDS
  )
  there = everything.available_splits()
  if 'train' not in there:
    raise ConfigError(f"TEXT_TFDS = {name!r} has no split 'train', but {', '.join(there)}.")
  splits = {split: split for split in SPLITS if split in there}
  found = corpora.TfdsCorpus(name, rules['field'], splits, data_dir, _OF_TFDS)
  return TextCorpus(found.folder, text_corpus.of_tfds(found), **rules)


text_task.register('text', __name__, corpus)
