"""Reads, writes and scores text with a checkpoint, from Python.

  python examples/sample_from_python.py [MODEL_DIR]

Without a MODEL_DIR it first trains the quick start for a minute, into runs/sample_from_python.
docs/sampling.md has all functions.
"""

import pathlib
import sys
import tempfile

import tvq_t5x
from tvq_t5x import SamplingConfig


def briefly_trained() -> tvq_t5x.Run:
  """The quick start after 200 updates: words, and no sense."""
  periods = [f'{name}_PERIOD = 200' for name in ('EVAL', 'SAMPLE', 'CHECKPOINT')]
  settings = ['TRAIN_STEPS = 200', 'WARMUP_STEPS = 20', 'TEST_SPLIT = None', *periods]
  return tvq_t5x.train_model('gin/kjv_tiny.gin', 'runs/sample_from_python', settings)


def main(model_dir: str | None = None) -> None:
  """Shows each function once."""
  lm = tvq_t5x.load(model_dir or briefly_trained())
  print(lm)

  # Two continuations at the same time. A state has a row for each; its size is constant.
  state, nats = lm.read(lm.start(batch_size=2), ['In the beginning', 'And he said'])
  print(state, 'after', [len(x) for x in nats], 'tokens')
  sampling = SamplingConfig(temperature=0.8, top_p=0.95)
  written = lm.generate(state, 100, seed=0, sampling=sampling)
  for tokens in written.tokens:
    print(repr(lm.text(tokens)))

  # Which text is likelier?
  for text in ('And God said, Let there be light.', 'And light let said there God be.'):
    print(f'{lm.score(text).bits_per_byte:.3f} bits per byte: {text}')

  # What was read once need not be read again, not even by another process.
  with tempfile.TemporaryDirectory() as folder:
    path = str(pathlib.Path(folder, 'state.npz'))
    lm.save_state(path, written.state)
    later = lm.load_state(path)
  print(repr(lm.text(lm.generate(later, 60, seed=1, sampling=sampling).tokens[0])))


if __name__ == '__main__':
  main(*sys.argv[1:])
