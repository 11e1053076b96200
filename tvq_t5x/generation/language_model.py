"""Generates and scores text with a checkpoint, from Python.

  lm = load('runs/kjv')
  state = lm.start(batch_size=2)
  state, nats = lm.read(state, ['In the beginning', 'And he said'])
  tokens, log_likelihoods, state = lm.generate(state, 200, seed=0)
  print(lm.text(tokens[0]))

A state is where B sequences stand: window, cache and last token. Its size does not depend on how
many tokens came before, and it may be continued, with `read` or `generate`, any number of times.
"""

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from tvq_t5x.checkpoints.restore import Loaded
from tvq_t5x.common import arguments, jax_modes, quiet
from tvq_t5x.common.errors import ConfigError, is_count
from tvq_t5x.generation import inspection, state_files
from tvq_t5x.generation.inspection import Inspection
from tvq_t5x.network import decoding
from tvq_t5x.network.decoding import GenerationState
from tvq_t5x.network.sampling import SamplingConfig
from tvq_t5x.network.transformer import Transformer
from tvq_t5x.training import placement, random_keys
from tvq_t5x.training.models import language_model_of
from tvq_t5x.training.partitioning import Partitioner

# Tokens of a row that one call of the compiled `decoding.read` gets, about.
_READ = 2048
_NATS_PER_BIT = float(np.log(2.0))

Text = str | Sequence[int] | np.ndarray  # Or its tokens.


class Generated(NamedTuple):
  """Tokens that a model chose.

  Attributes:
    tokens: [B, n] int32.
    log_likelihoods: [B, n] float32, of each token under the model, at temperature 1.
    state: after them.
  """

  tokens: np.ndarray
  log_likelihoods: np.ndarray
  state: GenerationState

  def __repr__(self) -> str:
    number, length = self.tokens.shape
    nats = -float(np.mean(self.log_likelihoods)) if self.tokens.size else 0.0
    return f'Generated(tokens {number} x {length:,}, {nats:.4f} nats a token)'


class Score(NamedTuple):
  """How well a model predicts a text.

  Attributes:
    tokens: [n] int32.
    nats: [n] float32, of each token given all before it.
    num_bytes: of text that the tokens stand for; None if the vocabulary does not say.
    state: after the text.
  """

  tokens: np.ndarray
  nats: np.ndarray
  num_bytes: int | None
  state: GenerationState

  def __repr__(self) -> str:
    bits = '' if self.bits_per_byte is None else f', {self.bits_per_byte:.4f} bits per byte'
    return f'Score({len(self.tokens):,} tokens, {self.total_nats:.2f} nats{bits})'

  @property
  def total_nats(self) -> float:
    """Minus the log-likelihood of the text."""
    return float(np.sum(self.nats, dtype=np.float64))

  @property
  def bits_per_byte(self) -> float | None:
    """None without bytes."""
    return self.total_nats / _NATS_PER_BIT / self.num_bytes if self.num_bytes else None


@jax_modes.usual()
def load(
  checkpoint: str | os.PathLike[str],
  gin_file: str | os.PathLike[str] | None = None,
  gin_bindings: Sequence[str] = (),
  search_paths: Sequence[str] = (),
  modules: Sequence[str] = (),
) -> 'LanguageModel':
  """Reads a checkpoint of either engine.

  Args:
    checkpoint: MODEL_DIR, whose newest checkpoint is taken, or one of its checkpoint_N folders.
    gin_file: of the run that wrote it; None means `MODEL_DIR/config.gin`, which the standalone
      runner wrote. The configuration that gin holds is another one afterwards.
    gin_bindings: more settings, as after `--gin.`.
    search_paths: more folders to look for gin files in.
    modules: of yours, which `MODEL_DIR/config.gin` may import and call besides this package's own.

  Raises:
    ConfigError: for a wrong setting, or a checkpoint of another model.
    CheckpointError: if the checkpoint can't be read.
  """
  gin_files = [] if gin_file is None else [arguments.path('gin_file', gin_file)]
  lists = {'gin_bindings': gin_bindings, 'search_paths': search_paths, 'modules': modules}
  lists = [arguments.texts(name, values) for name, values in lists.items()]
  path = arguments.path('checkpoint', checkpoint)
  with quiet.imports():
    from tvq_t5x.gin_support import parsing
    from tvq_t5x.standalone import configuration  # Slow to import: TensorFlow.

  with parsing.plain_errors():
    return LanguageModel(configuration.load(path, gin_files, *lists))


class LanguageModel:
  """A model with the parameters of a checkpoint, that reads and writes.

  B sequences are laid out over the devices that share a batch, or B is no multiple of them and all
  have all sequences. A program is compiled for each B, and number of tokens to generate, once.

  Attributes:
    loaded: the model, its parameters, and where they come from.
    model: that one.
    vocabulary: of the tokens.
  """

  def __init__(self, loaded: Loaded):
    """Compiles nothing yet."""
    self.loaded = loaded
    self.model = language_model_of(loaded.model)
    self.vocabulary = self.model.output_vocabulary
    self._programs: dict[Any, Callable[..., Any]] = {}
    self._states: dict[int, Any] = {}  # For `_abstract_state`.

  def __repr__(self) -> str:
    number = sum(x.size for x in jax.tree.leaves(self.loaded.params))
    return (
      f'LanguageModel({number:,} parameters, step {self.loaded.step:,} of '
      f'{self.loaded.checkpoint}, {type(self.vocabulary).__name__})'
    )

  @jax_modes.usual()
  def start(self, batch_size: int = 1) -> GenerationState:
    """The state of B sequences without tokens: a document begins.

    Its leaves are arrays whose sizes depend on B and the model only.

    Raises:
      ConfigError: for less than one sequence.
    """
    if not is_count(batch_size):
      raise ConfigError(f'batch_size = {batch_size!r}: give a whole number of at least 1.')
    init = functools.partial(decoding.start, self._module, batch_size)
    shardings = self._state_shardings(batch_size)
    return self._program(('start', batch_size), batch_size, init, (), shardings)()

  @jax_modes.usual()
  def read(
    self, state: GenerationState, texts: Sequence[Text]
  ) -> tuple[GenerationState, list[np.ndarray]]:
    """Continues sequences with given text.

    Args:
      state: of B sequences; remains as it is.
      texts: B texts, or their tokens; of different lengths, perhaps empty.

    Returns:
      The state after the texts, and for each row the nats [n] float32 of its tokens, each given all
      before it.

    Raises:
      ConfigError: if a text has characters that the vocabulary lacks, a token is none of it, or the
        state is none of this model.
    """
    self._check_state(state)
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
      raise ConfigError(f'texts = {texts!r}: give a list of texts, one for each sequence.')
    rows = list(map(self._tokens, texts))
    if len(rows) != len(state.token):
      raise ConfigError(f'{len(rows)} texts for a state of {len(state.token)} sequences.')
    nats: list[list[np.ndarray]] = [[np.zeros(0, np.float32)] for _ in rows]
    block = self.model.config.block_len
    size = max(_READ // block, 1) * block
    for first in range(0, max(map(len, rows)), size):
      parts = [row[first : first + size] for row in rows]
      lengths = np.array(list(map(len, parts)), np.int32)
      # Whole blocks: few different shapes to compile for.
      tokens = np.zeros([len(rows), -(-max(lengths) // block) * block], np.int32)
      for i, part in enumerate(parts):
        tokens[i, : len(part)] = part
      state, part_nats = self._read(state, tokens, lengths)
      for i, row_nats in enumerate(np.asarray(part_nats)):
        nats[i].append(row_nats[: lengths[i]])
    return state, list(map(np.concatenate, nats))

  def _read(
    self, state: GenerationState, tokens: np.ndarray, lengths: np.ndarray
  ) -> tuple[GenerationState, jax.Array]:
    def read(params, state, tokens, lengths):
      state, _, nats = decoding.read(self._module, params, state, tokens, lengths)
      return state, nats

    batch_size = len(tokens)
    states = self._state_shardings(batch_size)
    row = self._partitioner(batch_size).batch_sharding()
    program = self._program(
      ('read', batch_size), batch_size, read, (self._params, states, row, row), (states, None)
    )
    return program(self.loaded.params, state, tokens, lengths)

  @jax_modes.usual()
  def generate(
    self,
    state: GenerationState,
    num_tokens: int,
    seed: int = 0,
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008, it is frozen.
  ) -> Generated:
    """Continues sequences with tokens of the model's choice, none that stand for nothing.

    The choice of a token depends on the seed, its row and its position: n tokens and then m more
    are the n + m tokens of one call.

    Args:
      state: of B sequences; remains as it is.
      num_tokens: that each of them gets, at least 1.
      seed: of the choice, a whole number of 64 bits.
      sampling: how a token is chosen.

    Raises:
      ConfigError: for less than one token, no seed, or no state of this model.
    """
    self._check_state(state)
    if not is_count(num_tokens):
      raise ConfigError(f'num_tokens = {num_tokens!r}: give a whole number of at least 1.')
    if not isinstance(sampling, SamplingConfig):
      raise ConfigError(f'sampling = {sampling!r}: give a tvq_t5x.SamplingConfig.')
    batch_size, rng = len(state.token), random_keys.key_of(seed, 'seed')

    def generate(params, state, rng):
      allowed = self.model.sampled_ids
      return decoding.generate(
        self._module, params, state, num_tokens, rng, sampling, allowed=allowed
      )

    states = self._state_shardings(batch_size)
    program = self._program(
      ('generate', batch_size, num_tokens, sampling),
      batch_size,
      generate,
      (self._params, states, None),
      (None, None, states),
    )
    tokens, log_likelihoods, state = program(self.loaded.params, state, rng)
    return Generated(np.asarray(tokens), np.asarray(log_likelihoods), state)

  def score(self, text: Text, state: GenerationState | None = None) -> Score:
    """How well the model predicts a text, of any length, in constant memory of the devices.

    Args:
      text: or its tokens.
      state: of one sequence, what came before; None means that a document begins.

    Raises:
      ConfigError: as for `read`.
    """
    state = self.start() if state is None else state
    tokens = self._tokens(text)
    state, (nats,) = self.read(state, [tokens])
    return Score(tokens, nats, self.num_bytes(tokens), state)

  def score_parts(
    self, parts: Iterable[Text], state: GenerationState | None = None
  ) -> Iterator[Score]:
    """`score` for a text that need not fit in memory, such as `text_streams.encode_file` gives it.

    Args:
      parts: tokens, one part after the other.
      state: as in `score`.

    Yields:
      The score of each part given all before it; their nats and bytes add up to those of the text.
    """
    for part in parts:
      score = self.score(part, state)
      yield score
      state = score.state

  @jax_modes.usual()
  def inspect(self, text: Text, state: GenerationState | None = None) -> Inspection:
    """Logits, hidden states and codes of all tokens of a text, from one forward pass.

    Args:
      text: or its tokens, at least one; the devices hold what is returned.
      state: of one sequence, what came before; None means that a document begins.

    Raises:
      ConfigError: as for `read`, and for a text without tokens.
    """
    state = self.start() if state is None else state
    tokens = self._tokens(text)
    if not len(tokens) or len(state.token) != 1:
      raise ConfigError(
        'inspect takes a text of at least one token, and the state of one sequence.'
      )
    return inspection.inspect(self._module, self.loaded.params, state, tokens)

  def encode(self, text: str, source: str = 'the text') -> list[int]:
    """The tokens of a text, without EOS.

    Args:
      text: any.
      source: of it, for the message.

    Raises:
      ConfigError: if it has characters that the vocabulary lacks, or is no text.
    """
    if not isinstance(text, str):
      raise ConfigError(f'{source} = {text!r}: give a str.')
    from tvq_t5x.data import text_streams

    return text_streams.encode(text, self.vocabulary, source)

  def text(self, tokens: Iterable[int]) -> str:
    """The text of tokens; EOS is an empty line, and bytes that are no UTF-8 are U+FFFD.

    Raises:
      ConfigError: if one is no token of the vocabulary.
    """
    from tvq_t5x.data import text_streams

    ids = list(tokens) if isinstance(tokens, Iterable) and not isinstance(tokens, str) else tokens
    return text_streams.text_of(self._ids(ids), self.vocabulary)

  def num_bytes(self, tokens: np.ndarray) -> int | None:
    """Bytes of text that tokens stand for; None if the vocabulary does not say.

    Raises:
      ConfigError: if one is no token of the vocabulary.
    """
    table = self.model.bytes_per_token
    return None if table is None else int(np.sum(table[self._ids(tokens)], dtype=np.int64))

  @jax_modes.usual()
  def repeat(self, state: GenerationState, times: int) -> GenerationState:
    """Each sequence of a state, `times` times in a row.

    Raises:
      ConfigError: for less than once, or no state of this model.
    """
    self._check_state(state)
    if not is_count(times):
      raise ConfigError(f'times = {times!r}: give a whole number of at least 1.')
    repeat = functools.partial(decoding.repeat, self._module, times=times)
    batch_size = len(state.token) * times
    shardings = self._state_shardings(batch_size)
    return self._program(('repeat', batch_size, times), batch_size, repeat, None, shardings)(state)

  def save_state(
    self,
    path: str | os.PathLike[str],
    state: GenerationState,
    undecoded: Sequence[bytes] | None = None,
  ) -> None:
    """Writes a state to a file, an .npz archive; replaces it at once.

    Args:
      path: of the file.
      state: of B sequences.
      undecoded: B times the `TextDecoder.undecoded` of their texts, for `sample --state_in`; None
        means that they end with whole characters.

    Raises:
      ConfigError: for no state of this model, or another number of `undecoded`.
    """
    self._check_state(state)
    number = len(state.token)
    if undecoded is not None and (
      len(undecoded) != number or not all(isinstance(x, bytes) for x in undecoded)
    ):
      raise ConfigError(f'undecoded = {undecoded!r}: give bytes for each of {number} sequences.')
    state_files.save(arguments.path('path', path), state, self.loaded, undecoded)

  @jax_modes.usual()
  def load_state(self, path: str | os.PathLike[str]) -> GenerationState:
    """Reads a state that `save_state` wrote, on these devices or others.

    Raises:
      ConfigError: if it is none, or one of another model.
    """
    state = state_files.load(path, self.loaded)
    return jax.device_put(state, self._state_shardings(len(state.token)))

  def _tokens(self, text: Text) -> np.ndarray:
    """The tokens [n] int32 of a text, which may be given as such."""
    return self._ids(self.encode(text) if isinstance(text, str) else text)

  def _ids(self, tokens: Any) -> np.ndarray:
    """Tokens [n] int32."""
    try:
      ids = np.asarray(tokens)
    except ValueError:  # Lists of different lengths.
      ids = np.zeros([1, 1])
    size = self.model.config.vocab_size
    numbers = ids.dtype.kind in 'iu' and (not ids.size or 0 <= ids.min() <= ids.max() < size)
    if ids.ndim != 1 or (ids.size and not numbers):
      raise ConfigError(f'the tokens of a text are whole numbers from 0 to {size - 1}.')
    return ids.astype(np.int32)

  def _check_state(self, state: Any) -> None:
    """Refuses what is no state, and one of a model of other sizes."""
    try:
      expected = self._abstract_state(len(state.token))
      found = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    except (AttributeError, TypeError):
      expected = found = None
    if found is None or found != expected:
      raise ConfigError(
        f'state = {type(state).__name__}: give one of this model, as `start` and `load_state` do.'
      )

  def _abstract_state(self, batch_size: int) -> Any:
    """Shapes and dtypes of a state."""
    if batch_size not in self._states:
      init = functools.partial(decoding.start, self._module, batch_size)
      self._states[batch_size] = jax.tree.map(lambda x: (x.shape, x.dtype), jax.eval_shape(init))
    return self._states[batch_size]

  @property
  def _module(self) -> Transformer:
    return self.model.module

  @functools.cached_property
  def _params(self) -> Any:
    return self.loaded.params_shardings

  def _partitioner(self, batch_size: int) -> Partitioner:
    return self.loaded.partitioner.for_batch(batch_size)

  def _state_shardings(self, batch_size: int) -> GenerationState:
    partitioner = self._partitioner(batch_size)
    decoder = placement.decoder_state_shardings(partitioner, self.model.config)
    return GenerationState(decoder, partitioner.batch_sharding())

  def _program(
    self,
    key: tuple[Any, ...],
    batch_size: int,
    function: Callable[..., Any],
    in_shardings: Any,
    out_shardings: Any,
  ) -> Callable[..., Any]:
    """`function` for B sequences, compiled once for each key."""
    if key not in self._programs:
      self._programs[key] = self._partitioner(batch_size).jit(function, in_shardings, out_shardings)
    return self._programs[key]
