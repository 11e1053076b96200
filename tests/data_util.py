"""Reading tasks, and small corpora in their formats on disk, shared by tests."""

import io
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import sentencepiece
import seqio
import tensorflow_datasets as tfds

from tvq_t5x import train_vocab

BOOKS = (
  'In the beginning  there were\ttwo\r\n\nspaces.\r\n',
  'A caf\u00e9, a na\u00efve fa\u00e7ade; \u4e2d\u6587 \U0001f600\n',
  'x\n' * 40 + 'end',
  'the sea and the sky and the ship and the sea\n' * 5,
)


def sequences(task: str | seqio.Task, length: int | None, split: str, **kwargs) -> list[np.ndarray]:
  """Targets of a task's sequences, in order unless said otherwise."""
  provider = seqio.get_mixture_or_task(task) if isinstance(task, str) else task
  lengths = None if length is None else {'targets': length}
  dataset = provider.get_dataset(lengths, split=split, **{'shuffle': False, **kwargs})
  return [example['targets'] for example in dataset.as_numpy_iterator()]


def sentencepiece_model(folder, vocab_size: int = 300, text: str = ''.join(BOOKS)) -> str:
  """Path of a small SentencePiece model."""
  path = folder / f'pieces{vocab_size}.model'
  path.write_bytes(train_vocab.train(train_vocab.lines([text.encode()]), vocab_size))
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


def processor(path: str) -> sentencepiece.SentencePieceProcessor:
  """SentencePiece itself, to compare with."""
  return sentencepiece.SentencePieceProcessor(model_file=path)


def store_as_tfds(
  data_dir: pathlib.Path, name: str, features: Mapping, splits: Mapping[str, Sequence[Mapping]]
) -> None:
  """Writes a dataset as TFDS prepares it, in the order given.

  Args:
    data_dir: TFDS's data directory.
    name: with version and, after a slash, configuration.
    features: as TFDS's `FeaturesDict` takes them.
    splits: examples.
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
    disable_shuffling=True,
  )
