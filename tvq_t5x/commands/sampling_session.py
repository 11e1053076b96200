"""What `python -m tvq_t5x.sample` does with a checkpoint: texts, images, scores."""

import contextlib
import io
import math
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import seqio
from absl import logging

from tvq_t5x.commands import command_line
from tvq_t5x.commands.sampling_options import Options
from tvq_t5x.common import files, images
from tvq_t5x.common.errors import ConfigError
from tvq_t5x.data import likelihood, text_streams, vocabularies
from tvq_t5x.generation import state_files
from tvq_t5x.generation.language_model import Generated, LanguageModel, Score
from tvq_t5x.network.decoding import GenerationState
from tvq_t5x.network.sampling import SamplingConfig
from tvq_t5x.standalone import configuration
from tvq_t5x.standalone.configuration import Configured
from tvq_t5x.training.models import language_model_of

_MAX_TOKENS = 256
_PNG = 'samples.png'
# Tokens that are shown at a time.
_TEXT_CHUNK, _IMAGE_CHUNK = 32, 1024
# Tokens of a prompt that is read in parts, with which the last character is complete.
_LAST = 8
_RULE = '-' * 80
# What a choice of the likeliest token has no use for.
_OF_CHOICES = ('top_p', 'top_k', 'seed')
# A terminal would obey them.
_CONTROLS = {i: '\ufffd' for i in (*range(32), *range(127, 160)) if chr(i) not in '\n\t'}


def run(configured: Configured, options: Options) -> None:
  """Writes texts or images, or scores texts.

  Args:
    configured: from `configuration.configure`; gin is still configured in the same way.
    options: checked.

  Raises:
    ConfigError: for what can't be; nothing is compiled before.
    CheckpointError: if the checkpoint can't be read.
  """
  vocabulary = language_model_of(configured.model).output_vocabulary
  prompts = _Prompts(options, vocabulary)
  if isinstance(vocabulary, vocabularies.ImageVocabulary):
    _check_for_images(options, vocabulary)
  else:
    _check_texts(options, prompts)
  sampling = _sampling(options)
  lm = LanguageModel(configured.restore())
  session = _load(lm, options.state_in) if options.state_in else None
  if options.score:
    session = _score(lm, session or _begin(lm), options, prompts)
  elif isinstance(vocabulary, vocabularies.ImageVocabulary):
    session = _write_images(lm, options, sampling)
  else:
    session = _write_texts(lm, session, options, sampling, prompts)
  if options.state_out:
    lm.save_state(options.state_out, session.state, [x or b'' for x in session.undecoded])


class _Session(NamedTuple):
  """Where B sequences stand, and their texts: what `TextDecoder` continues from."""

  state: GenerationState
  undecoded: list[bytes | None]


def _begin(lm: LanguageModel, batch_size: int = 1) -> _Session:
  return _Session(lm.start(batch_size), [None] * batch_size)


def _load(lm: LanguageModel, path: str) -> _Session:
  try:
    state = lm.load_state(path)
  except ConfigError as e:  # It begins with the path.
    raise ConfigError(f'--state_in={e}') from e
  begun = np.asarray(state.decoder.position) > 0
  saved = state_files.load_undecoded(path)
  return _Session(state, [x if b else None for x, b in zip(saved, begun, strict=True)])


def _check_for_images(options: Options, vocabulary: vocabularies.ImageVocabulary) -> None:
  for name in ('prompt', 'prompt_file', 'state_in'):
    if getattr(options, name):
      raise ConfigError(f'--{name}: images are made from the first pixel on; leave it out.')
  size = math.prod(vocabulary.shape)
  if options.max_tokens and options.max_tokens > size:
    raise ConfigError(f'--max_tokens={options.max_tokens}: an image has {size} values.')


def _check_texts(options: Options, prompts: '_Prompts') -> None:
  if options.png:
    raise ConfigError('--png: the task is not one of images; leave it out.')
  text_streams.TextDecoder(prompts.vocabulary)
  # Each of them is encoded; a vocabulary of bytes accepts all files.
  if options.prompt or not isinstance(prompts.vocabulary, seqio.ByteVocabulary):
    for parts in prompts:
      for _ in parts:
        pass
  if options.score and options.state_out and len(options.prompt) > 1:
    raise ConfigError('--state_out with --score: give one prompt.')


class _Prompts:
  """The tokens of each prompt, in parts; they may be asked for any number of times."""

  def __init__(self, options: Options, vocabulary: seqio.Vocabulary):
    self._options, self.vocabulary = options, vocabulary
    self._held: bytes | None = None  # Of a file that can be read once only.

  def __len__(self) -> int:
    return 1 if self._options.prompt_file else len(self._options.prompt)

  def __iter__(self) -> Iterator[Iterator[np.ndarray]]:
    if self._options.prompt_file:
      yield self._parts_of_file(self._options.prompt_file)
    else:
      yield from map(self._parts_of_text, self._options.prompt)

  def _parts_of_text(self, text: str) -> Iterator[np.ndarray]:
    yield np.asarray(text_streams.encode(text, self.vocabulary, '--prompt'), np.int32)

  def _parts_of_file(self, path: str) -> Iterator[np.ndarray]:
    with self._open(path) as f:
      yield from text_streams.encode_file(f, self.vocabulary, f'--prompt_file={path}')

  def _open(self, path: str) -> BinaryIO:
    if path != '-' and stat.S_ISREG(os.stat(path).st_mode):
      return open(path, 'rb')
    if self._held is None:
      with open(0 if path == '-' else path, 'rb', closefd=path != '-') as f:
        self._held = f.read()
    return io.BytesIO(self._held)


def _sampling(options: Options) -> SamplingConfig:
  """How tokens are chosen: as in the samples of the run, unless flags say otherwise."""
  run_config = configuration.setting('sample_cfg') or SamplingConfig()
  temperature = run_config.temperature if options.temperature is None else options.temperature
  for name in _OF_CHOICES if temperature == 0 else ():
    if getattr(options, name) is not None:
      raise ConfigError(
        f'--{name}: temperature 0 takes the likeliest token; leave it out, or give another '
        '--temperature.'
      )
  top_p = run_config.top_p if options.top_p is None else options.top_p
  return SamplingConfig(temperature, top_p, options.top_k or 0)


def _read(
  lm: LanguageModel, session: _Session | None, options: Options, prompts: _Prompts
) -> tuple[_Session, list[np.ndarray]]:
  """The session, its state after the prompts, and the last tokens of each prompt.

  All tokens of a prompt, unless it is of a file.
  """
  session = session or _begin(lm, max(len(prompts), 1))
  state, number = session.state, len(session.undecoded)
  if options.prompt_file and number == 1:
    last = np.zeros(0, np.int32)
    for part in next(iter(prompts)):
      state, _ = lm.read(state, [part])
      last = np.concatenate([last, part])[-_LAST:]
    return session._replace(state=state), [last]
  texts = [np.concatenate([np.zeros(0, np.int32), *parts]) for parts in prompts]
  if len(texts) == 1:
    texts *= number
  if texts and len(texts) != number:
    raise ConfigError(
      f'--prompt: --state_in has {number} sequences; give one prompt for all, or {number}.'
    )
  if texts:
    state, _ = lm.read(state, texts)
  return session._replace(state=state), texts or [np.zeros(0, np.int32)] * number


def _generated(
  lm: LanguageModel,
  state: GenerationState,
  number: int,
  chunk: int,
  options: Options,
  sampling: SamplingConfig,
) -> Iterator[Generated]:
  """`number` tokens, a chunk at a time."""
  for first in range(0, number, chunk):
    part = lm.generate(state, min(chunk, number - first), options.seed or 0, sampling)
    state = part.state
    yield part


def _write_texts(
  lm: LanguageModel,
  session: _Session | None,
  options: Options,
  sampling: SamplingConfig,
  prompts: _Prompts,
) -> _Session:
  (state, undecoded), read = _read(lm, session, options, prompts)
  if options.samples > 1:
    state = lm.repeat(state, options.samples)
  read, undecoded = (
    [x for x in rows for _ in range(options.samples)] for rows in (read, undecoded)
  )
  decoders = [text_streams.TextDecoder(lm.vocabulary, x) for x in undecoded]
  heads = [decoder.push(prompt) for decoder, prompt in zip(decoders, read, strict=True)]
  if options.prompt_file:
    heads = [''] * len(heads)
  in_text = options.json != '-'
  texts: list[list[str]] = [[] for _ in read]
  parts: list[Generated] = []
  _show(heads[0], in_text)
  number, start = options.max_tokens or _MAX_TOKENS, time.monotonic()
  for part in _generated(lm, state, number, _TEXT_CHUNK, options, sampling):
    parts.append(part)
    for text, decoder, row in zip(texts, decoders, part.tokens, strict=True):
      text.append(decoder.push(row))
    _show(texts[0][-1], in_text)
  for text, decoder in zip(texts, decoders, strict=True):
    # The session that continues this one may complete the character.
    text.append('' if options.state_out else decoder.finish())
  _show(f'{texts[0][-1]}\n', in_text)
  # The others have come at the same time; one after the other they can be read.
  for head, text in zip(heads[1:], texts[1:], strict=True):
    _show(f'{_RULE}\n{head}{"".join(text)}\n', in_text)
  seconds = time.monotonic() - start
  logging.info('%s tokens in %.1f seconds.', f'{number * len(texts):,}', seconds)
  _write_records(lm, options, sampling, parts, list(map(''.join, texts)))
  return _Session(parts[-1].state, [decoder.undecoded for decoder in decoders])


def _show(text: str, wanted: bool) -> None:
  if wanted:
    print(text.translate(_CONTROLS), end='', flush=True)


def _write_records(
  lm: LanguageModel,
  options: Options,
  sampling: SamplingConfig,
  parts: Sequence[Generated],
  texts: Sequence[str],
) -> None:
  """Writes what there is to say of each sample; `texts` are empty for images."""
  tokens = np.concatenate([part.tokens for part in parts], axis=1)
  nats = -np.concatenate([part.log_likelihoods for part in parts], axis=1)
  with _json(options) as write:
    for i, row in enumerate(tokens):
      prompt = options.prompt_file
      if options.prompt:
        prompt = options.prompt[i // options.samples % len(options.prompt)]
      write(
        {
          'prompt': prompt,
          'sample': i % options.samples,
          **({'text': texts[i]} if texts else {}),
          'tokens': row.tolist(),
          'nats': float(np.sum(nats[i], dtype=np.float64)),
          'seed': options.seed or 0,
          'temperature': sampling.temperature,
          'top_p': sampling.top_p,
          'top_k': sampling.top_k,
          'checkpoint': str(lm.loaded.checkpoint),
        }
      )


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
  """Gives the path to an error of writing, which has none."""
  try:
    yield
  except OSError as e:
    raise e if e.filename else OSError(e.errno, e.strerror, path) from e


@contextlib.contextmanager
def _json(options: Options) -> Iterator[Callable[[dict[str, Any]], None]]:
  """A function that writes a record to where --json says, if anywhere."""
  with contextlib.ExitStack() as stack:
    file = None
    if options.json not in (None, '-'):
      stack.enter_context(_naming(options.json))
      file = stack.enter_context(open(options.json, 'w', encoding='utf-8'))

    def write(record: dict[str, Any]) -> None:
      if options.json:
        print(files.json_line(record), end='', file=file)

    yield write


def _write_images(lm: LanguageModel, options: Options, sampling: SamplingConfig) -> _Session:
  vocabulary = lm.vocabulary
  assert isinstance(vocabulary, vocabularies.ImageVocabulary)
  number = options.max_tokens or math.prod(vocabulary.shape)
  begin = _begin(lm, options.samples)
  parts: list[Generated] = []
  for part in _generated(lm, begin.state, number, _IMAGE_CHUNK, options, sampling):
    parts.append(part)
    done = min(len(parts) * _IMAGE_CHUNK, number)
    logging.info('%s of %s values.', f'{done:,}', f'{number:,}')
  tokens = np.concatenate([part.tokens for part in parts], axis=1)
  path = options.png or _PNG
  images.write_grid(path, vocabulary.images(tokens))
  if options.json != '-':
    print(path)
  _write_records(lm, options, sampling, parts, [])
  return begin._replace(state=parts[-1].state)


def _score(lm: LanguageModel, session: _Session, options: Options, prompts: _Prompts) -> _Session:
  if len(session.undecoded) != 1:
    raise ConfigError(f'--state_in has {len(session.undecoded)} sequences: --score continues one.')
  sources = options.prompt or [options.prompt_file or '']
  after, last = session.state, np.zeros(0, np.int32)
  with _json(options) as write:
    for source, parts in zip(sources, prompts, strict=True):
      start, sums = time.monotonic(), np.zeros(3)
      for score in lm.score_parts(parts, session.state):
        if options.per_token:
          _write_tokens(lm, options, write, score, int(sums[1]))
        sums += score.total_nats, len(score.tokens), score.num_bytes or 0
        after, last = score.state, np.concatenate([last, score.tokens])[-_LAST:]
      nats, tokens, size = float(sums[0]), int(sums[1]), int(sums[2])
      if not tokens:
        flag = '--prompt' if options.prompt else f'--prompt_file={source}'
        raise ConfigError(f'{flag}: there is no text to score.')
      values = {
        'nats': nats,
        **({'bits_per_byte': nats / math.log(2.0) / size} if size else {}),
        'cross_entropy': nats / tokens,
        'perplexity': likelihood.perplexity(nats / tokens),
        'tokens': tokens,
        **({'bytes': size} if size else {}),
        'seconds': time.monotonic() - start,
      }
      write({'prompt': source, **values, 'checkpoint': str(lm.loaded.checkpoint)})
      if options.json != '-':
        _show(source if len(source) <= 80 else f'{source[:77]}...', True)
        print()
        print(command_line.table(values))
  decoder = text_streams.TextDecoder(lm.vocabulary, session.undecoded[0])
  decoder.push(last)
  return _Session(after, [decoder.undecoded])


def _write_tokens(
  lm: LanguageModel,
  options: Options,
  write: Callable[[dict[str, Any]], None],
  score: Score,
  position: int,
) -> None:
  """A line for each token of a part of a text, which begins at a position."""
  texts = vocabularies.texts_of_tokens(lm.vocabulary) or []
  for i, (token, nats) in enumerate(zip(score.tokens.tolist(), score.nats.tolist(), strict=True)):
    text = texts[token].decode(errors='backslashreplace') if token < len(texts) else ''
    write({'position': position + i, 'token': token, 'text': text, 'nats': nats})
    if options.json != '-':
      print(f'{position + i:>9}  {token:>6}  {nats:>9.4f}  {text!r}')
