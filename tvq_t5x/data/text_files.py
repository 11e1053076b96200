"""Texts in the user's files: plain, compressed, or a field of records; found, read in parts."""

import contextlib
import glob
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from tvq_t5x.common.errors import ConfigError, reason
from tvq_t5x.data import locations

_BLOCK = 1 << 20
_COMPRESSED = ('.gz', '.zst')
# What a folder is searched for. Other files have to be named, and are texts.
_KINDS = {'.txt': 'text', '.jsonl': 'jsonl', '.parquet': 'parquet', '.arrow': 'arrow'}
_BOM = b'\xef\xbb\xbf'
_INSTALL = "pip install 'tvq_t5x[text]'"


class TextFile(NamedTuple):
  """A file of texts.

  Attributes:
    path: of the file.
    kind: 'text', or 'jsonl', 'parquet' or 'arrow' for records.
  """

  path: str
  kind: str

  @property
  def has_records(self) -> bool:
    """Whether it is a table, one field of which is the texts."""
    return self.kind != 'text'


class Found(NamedTuple):
  """What names stand for.

  Attributes:
    files: each once, those of a folder or pattern in the order of their paths.
    others: paths in folders that are left alone, as no text is known to be in them.
  """

  files: tuple[TextFile, ...]
  others: tuple[str, ...]


def find(names: Sequence[str], setting: str) -> Found:
  """Looks for files; reads nothing but the list of files of a Hugging Face data set.

  Folders of tokens that we keep beside data are not searched.

  Args:
    names: paths of files, of folders, which are searched with all that is below them, or patterns,
      in which `**` is any folders. A file that is there is no pattern, whatever it is called.
    setting: that names come from, for messages.

  Raises:
    ConfigError: for a name that nothing has.
  """
  files: dict[str, TextFile] = {}
  others: list[str] = []
  for name in names:
    paths, unknown = _paths(name, setting)
    files.update((path, TextFile(path, _kind(path) or 'text')) for path in paths)
    others += unknown
  return Found(tuple(files.values()), tuple(others))


def _paths(name: str, setting: str) -> tuple[list[str], list[str]]:
  if '://' in name:
    raise ConfigError(f'{setting}: {name} is not on this machine: give local files or folders.')
  path = os.path.expanduser(name)
  if os.path.isfile(path):
    return [path], []
  if os.path.isdir(path):
    if os.path.exists(os.path.join(path, 'state.json')):
      return _arrow_files(path, setting), []
    known, unknown = _files_below(path, setting)
    if not known:
      shown = f'; there is {unknown[0]}, which a pattern would name' if unknown else ''
      raise ConfigError(f'{setting}: {path} holds no file of {_shown_kinds()}{shown}.')
    return known, unknown
  matches = glob.glob(path, recursive=True)
  found = sorted(x for x in matches if os.path.isfile(x) and not _is_of_tokens(x))
  if not found:
    raise ConfigError(
      f'{setting}: there is no {name}; give a file, a folder, or a pattern such as '
      "'books/**/*.txt'."
    )
  return found, []


def _is_of_tokens(path: str) -> bool:
  return locations.TOKEN_CACHE in path.split(os.sep)[:-1]


def _files_below(folder: str, setting: str) -> tuple[list[str], list[str]]:
  """The files with texts, and the others; hidden ones are neither. Links are followed.

  Pipes and devices are among the others: they can't be read twice, or wait for a writer.
  """

  def refuse(error: OSError) -> None:
    raise ConfigError(f'{setting}: {folder} can not be searched: {reason(error)}') from error

  known, unknown, seen = [], [], set()
  for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
    if (real := os.path.realpath(parent)) in seen:  # Links may lead round in a circle.
      folders.clear()
      continue
    seen.add(real)
    folders[:] = sorted(x for x in folders if x[0] != '.' and x != locations.TOKEN_CACHE)
    for name in sorted(names):
      if name[0] != '.':
        path = os.path.join(parent, name)
        special = os.path.exists(path) and not os.path.isfile(path)
        (known if _kind(name) and not special else unknown).append(path)
  return sorted(known), sorted(unknown)


def _arrow_files(folder: str, setting: str) -> list[str]:
  """The files of `datasets.Dataset.save_to_disk`, in their order."""
  try:
    with open(os.path.join(folder, 'state.json'), encoding='utf-8') as f:
      state = json.load(f)
    names = [entry['filename'] for entry in state['_data_files']]
    chosen = state.get('_indices_data_files')
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise ConfigError(
      f'{setting}: {folder} is no data set of Hugging Face: state.json: {reason(e)}'
    ) from e
  if chosen:
    raise ConfigError(
      f'{setting}: {folder} holds a selection of rows, not the rows: save it again after '
      'flatten_indices().'
    )
  return [os.path.join(folder, name) for name in names]


def _kind(path: str) -> str | None:
  """The kind that a name tells."""
  for ending in _COMPRESSED:
    if path.lower().endswith(ending):
      # A file that is only called .gz has text.
      return _KINDS.get(os.path.splitext(path[: -len(ending)])[1].lower(), 'text')
  return _KINDS.get(os.path.splitext(path)[1].lower())


def _shown_kinds() -> str:
  return ', '.join((*_KINDS, *_COMPRESSED))


def blocks(file: TextFile, start: int = 0) -> Iterator[bytes]:
  """The bytes of a file as they are, after decompression; no block is empty.

  Args:
    file: of any kind.
    start: bytes to leave out.

  Raises:
    ConfigError: for a file that is damaged, or that an extra is needed for.
  """
  with _opened(file.path) as f:
    if f.seekable():
      f.seek(start)
    else:
      while start and (block := f.read(min(start, _BLOCK))):
        start -= len(block)
    while block := f.read(_BLOCK):
      yield block


def size(file: TextFile) -> int:
  """The bytes of a file, after decompression."""
  if file.path.lower().endswith(_COMPRESSED):
    return sum(map(len, blocks(file)))
  return os.path.getsize(file.path)


def lines(file: TextFile) -> Iterator[bytes]:
  """The lines of a file, without their line feeds.

  Raises:
    ConfigError: as `blocks`.
  """
  with _opened(file.path) as f:
    for line in f:
      yield line.removesuffix(b'\n')


def records(file: TextFile, field: str) -> Iterator[bytes]:
  """The texts of a table in order, in UTF-8.

  Args:
    file: of records.
    field: of a record that is its text: a string or bytes.

  Raises:
    ConfigError: as `blocks`, and for a record without text.
  """
  read = _json_values if file.kind == 'jsonl' else _column
  for number, value in enumerate(read(file, field), 1):
    if isinstance(value, str):
      yield value.encode(errors='surrogatepass')  # JSON may hold half of a pair.
    elif isinstance(value, bytes):
      yield value
    else:
      raise ConfigError(
        f'{file.path}, record {number}: {field!r} is {type(value).__name__}, no text; give another '
        'TEXT_FIELD, or leave such records out of the file.'
      )


def _json_values(file: TextFile, field: str) -> Iterator[Any]:
  for number, line in enumerate(lines(file), 1):
    line = line.removeprefix(_BOM) if number == 1 else line
    if not line.strip():
      continue
    try:
      record = json.loads(line)
    except ValueError as e:
      raise ConfigError(f'{file.path}, line {number} is no JSON: {reason(e)}') from e
    if not isinstance(record, dict):
      raise ConfigError(f'{file.path}, line {number} is no JSON object: give one on each line.')
    if field not in record:
      raise _no_field(f'{file.path}, line {number}', field, record)
    yield record[field]


def _column(file: TextFile, field: str) -> Iterator[Any]:
  pa = _library('pyarrow', file.path)
  try:
    with pa.memory_map(file.path) as source:
      if file.kind == 'parquet':
        table = _library('pyarrow.parquet', file.path).ParquetFile(source)
        names, batches = table.schema_arrow.names, lambda: table.iter_batches(1000, columns=[field])
      else:
        table = _arrow_table(pa, source)
        names, batches = table.schema.names, lambda: iter(table)
      if field not in names:
        raise _no_field(file.path, field, names)
      for batch in batches():
        yield from batch.column(field).to_pylist()
  except (pa.ArrowException, OSError) as e:
    raise ConfigError(f'{file.path} can not be read: {reason(e)}') from e


def _arrow_table(pa: Any, source: Any) -> Any:
  """The batches of a file of either of Arrow's formats: Hugging Face writes the one of streams."""
  try:
    return pa.ipc.open_stream(source)
  except pa.ArrowInvalid:
    table = pa.ipc.open_file(source)
    batches = (table.get_batch(i) for i in range(table.num_record_batches))
    return pa.RecordBatchReader.from_batches(table.schema, batches)


def _no_field(where: str, field: str, names: Iterable[str]) -> ConfigError:
  known = ', '.join(map(str, names))
  return ConfigError(f'{where} has no field {field!r}: give TEXT_FIELD (--field) one of {known}.')


def _library(name: str, path: str) -> Any:
  import importlib

  try:
    return importlib.import_module(name)
  except ModuleNotFoundError as e:
    package = name.partition('.')[0]
    raise ConfigError(f'{path} is read with {package}, which is not there: {_INSTALL}.') from e


@contextlib.contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
  """A file to read, after decompression."""
  damaged: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
  try:
    if path.lower().endswith('.gz'):
      with gzip.open(path, 'rb') as f:
        yield f  # pyright: ignore[reportReturnType]
    elif path.lower().endswith('.zst'):
      zstandard = _library('zstandard', path)
      damaged = (*damaged, zstandard.ZstdError)
      with open(path, 'rb') as f, io.BufferedReader(_ZstdFile(f, zstandard), _BLOCK) as text:
        yield text
    else:
      with open(path, 'rb') as f:
        yield f
  except damaged as e:
    raise ConfigError(f'{path} can not be read: {reason(e)}') from e


class _ZstdFile(io.RawIOBase):
  """The text of a file of Zstandard frames; unlike the library's, it notices that the end lacks."""

  def __init__(self, file: BinaryIO, zstandard: Any):
    super().__init__()
    self._file, self._new = file, zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj
    self._frame: Any = None
    self._rest = b''  # Decompressed, and not given out.

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    while not self._rest:
      if not (data := self._file.read(1 << 16)):
        if self._frame is not None:
          raise EOFError('it ends within a frame of Zstandard')
        return 0
      self._rest = b''.join(self._decompressed(data))
    size = min(len(buffer), len(self._rest))
    buffer[:size], self._rest = self._rest[:size], self._rest[size:]
    return size

  def _decompressed(self, data: bytes) -> Iterator[bytes]:
    while data:
      self._frame = self._frame or self._new()
      yield self._frame.decompress(data)
      data = self._frame.unused_data
      if self._frame.eof:
        self._frame = None
