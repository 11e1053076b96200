"""A task of one's own, text that a function returns, and a model that trains for some seconds.

  python examples/own_task.py [MODEL_DIR [SETTING ...]]

Commands that are to read its checkpoint find this file with

  PYTHONPATH=examples python -m tvq_t5x.sample --checkpoint=MODEL_DIR --module=own_task

docs/own_data.md has more: files and folders of text need no Python at all.
"""

import random
import sys

import tvq_t5x
from tvq_t5x.data import indexed

DOCUMENTS = {'train': 2000, 'validation': 50, 'test': 50}


def documents(split: str) -> list[bytes]:
  """Sums, each document some of them; the same ones each time."""
  draw = random.Random(split)
  pairs = [
    [(draw.randrange(10), draw.randrange(10)) for _ in range(9)] for _ in range(DOCUMENTS[split])
  ]
  return [''.join(f'{a}+{b}={a + b}\n' for a, b in document).encode() for document in pairs]


def main(model_dir: str = 'runs/own_task', *settings: str) -> None:
  """Trains, and asks for sums."""
  run = tvq_t5x.train_model(
    ['gin/kjv_tiny.gin', 'examples/own_task.gin'], model_dir, list(settings)
  )
  print(run)
  lm = tvq_t5x.load(run, modules=['own_task'])
  questions = ['2+2=', '3+4=', '9+8=']
  state, _ = lm.read(lm.start(len(questions)), questions)
  tokens, _, _ = lm.generate(state, 2, seed=0, sampling=tvq_t5x.SamplingConfig(temperature=0))
  for question, answer in zip(questions, tokens, strict=True):
    print(question + lm.text(answer).split('\n')[0])


if __name__ == '__main__':
  import own_task  # The gin file names this module, which as a script has another name.

  own_task.main(*sys.argv[1:])
else:
  indexed.byte_level_task('sums', documents, splits=tuple(DOCUMENTS))
