"""Reading tasks, and small corpora in their formats on disk, shared by tests."""

import io
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import sentencepiece
import seqio
import tensorflow_datasets as tfds

from tvq_t5x.data import vocabulary_training

BOOKS = (
  'In the beginning  there were\ttwo\r\n\nspaces.\r\n',
  'A caf\u00e9, a na\u00efve fa\u00e7ade; \u4e2d\u6587 \U0001f600\n',
  'x\n' * 40 + 'end',
  'the sea and the sky and the ship and the sea\n' * 5,
)

# Of a file or folder, which a shell, a pattern or a URL would take for something else.
ODD_NAME = "[a] $HOME #b ~ *?%20{c}'"

PG19 = {'train': BOOKS[:2], 'validation': BOOKS[2:3], 'test': BOOKS[1:]}
_PG19_IDS = {'train': [702, 11], 'validation': [5000], 'test': [33, 9, 120]}


def sequences(task: str | seqio.Task, length: int | None, split: str, **kwargs) -> list[np.ndarray]:
  """Targets of a task's sequences, in order unless said otherwise."""
  provider = seqio.get_mixture_or_task(task) if isinstance(task, str) else task
  lengths = None if length is None else {'targets': length}
  dataset = provider.get_dataset(lengths, split=split, **{'shuffle': False, **kwargs})
  return [example['targets'] for example in dataset.as_numpy_iterator()]


def sentencepiece_model(folder, vocab_size: int = 300, text: str = ''.join(BOOKS)) -> str:
  """Path of a small SentencePiece model."""
  path = folder / f'pieces{vocab_size}.model'
  path.write_bytes(
    vocabulary_training.train(vocabulary_training.lines([text.encode()]), vocab_size)
  )
  return str(path)


def other_sentencepiece_model(folder, **changes) -> str:
  """Path of a small SentencePiece model that `train_vocab` would not make."""
  arguments = {
    'vocab_size': 300,
    'pad_id': 0,
    'eos_id': 1,
    'unk_id': 2,
    'bos_id': -1,
    'byte_fallback': True,
    'normalization_rule_name': 'identity',
    'remove_extra_whitespaces': False,
    'add_dummy_prefix': False,
  }
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(''.join(BOOKS).split('\n')),
    model_writer=model,
    model_type='bpe',
    minloglevel=2,
    **{**arguments, **changes},
  )
  path = folder / 'other.model'
  path.write_bytes(model.getvalue())
  return str(path)


def two_sentencepiece_models(folder) -> list[str]:
  """Paths of two of the same size, which differ in their pieces."""
  paths = []
  for symbol in ('sea', 'ship'):
    (folder / symbol).mkdir()
    paths.append(other_sentencepiece_model(folder / symbol, user_defined_symbols=[symbol]))
  return paths


def processor(path: str) -> sentencepiece.SentencePieceProcessor:
  """SentencePiece itself, to compare with."""
  return sentencepiece.SentencePieceProcessor(model_file=path)


def store_as_tfds(
  data_dir: pathlib.Path,
  name: str,
  features: Mapping,
  splits: Mapping[str, Sequence[Mapping]],
  file_format: str = 'tfrecord',
  num_shards: int | None = None,
  ordered: bool = True,
) -> None:
  """Writes a dataset as TFDS prepares it.

  Args:
    data_dir: TFDS's data directory.
    name: with version and, after a slash, configuration.
    features: as TFDS's `FeaturesDict` takes them.
    splits: examples.
    file_format: TFDS's name of it.
    num_shards: files of each split; None means that TFDS chooses.
    ordered: whether the examples stay in the order given, as they do in few datasets.
  """
  name, version = name.split(':')
  name, _, config = name.partition('/')
  tfds.dataset_builders.store_as_tfds_dataset(
    name=name,
    config=config or None,
    version=version,
    features=tfds.features.FeaturesDict(features),
    split_datasets={split: list(enumerate(examples)) for split, examples in splits.items()},
    data_dir=str(data_dir),
    disable_shuffling=ordered,
    file_format=file_format,
    download_config=tfds.download.DownloadConfig(num_shards=num_shards),
  )


def enwik8_stand_in(path: pathlib.Path) -> bytes:
  """Writes a file of Enwik8's size; returns what is in it."""
  data = (np.random.default_rng(0).bytes(1_000_003) * 100)[:100_000_000]
  path.write_bytes(data)
  return data


def pg19_as_published(folder: pathlib.Path) -> None:
  """Writes the books of `PG19` as PG-19's are published."""
  rows = []
  for split, texts in PG19.items():
    (folder / split).mkdir()
    for i, text in zip(_PG19_IDS[split], texts, strict=True):
      (folder / split / f'{i}.txt').write_bytes(text.encode())
      rows.append(f'{i},"Title, {i}",1850,http://www.gutenberg.org/ebooks/{i}\n')
  (folder / 'metadata.csv').write_text(''.join(rows))


def pg19_as_tfds(folder: pathlib.Path) -> None:
  """Writes the books of `PG19` as TFDS prepares PG-19."""
  texts = ('book_text', 'book_title', 'publication_date', 'book_link')
  features = {'book_id': np.int32, **{name: tfds.features.Text() for name in texts}}
  splits = {
    split: [
      {
        'book_text': text.strip(),
        'book_id': i,
        'book_title': f'Title {i}',
        'publication_date': '1850',
        'book_link': f'http://www.gutenberg.org/ebooks/{i}',
      }
      for i, text in zip(_PG19_IDS[split], books, strict=True)
    ]
    for split, books in PG19.items()
  }
  store_as_tfds(folder, 'pg19:0.1.1', features, splits)


def random_images(seed: int, number: int) -> np.ndarray:
  """Images [number, 64, 64, 3] uint8."""
  return np.random.default_rng(seed).integers(0, 256, (number, 64, 64, 3)).astype(np.uint8)


def imagenet64_as_tfds(folder: pathlib.Path, images: Mapping[str, np.ndarray]) -> None:
  """Writes images by split as TFDS prepares ImageNet64."""
  features = {'image': tfds.features.Image(shape=(64, 64, 3)), 'label': np.int64}
  splits = {
    split: [{'image': image, 'label': 7} for image in found] for split, found in images.items()
  }
  store_as_tfds(folder, 'imagenet_resized/64x64:0.1.0', features, splits)
