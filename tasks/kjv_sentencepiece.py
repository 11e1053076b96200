"""`kjv_sentencepiece`: the King James Bible in SentencePiece's pieces, PG-19's setting in small.

The books and splits of `kjv_bytes`. Train the vocabulary on the training split:

    python -m tvq_t5x.train_vocab --task=kjv_bytes --vocab_size=2048 --output=kjv2048

and set SENTENCEPIECE_MODEL to kjv2048.model, in gin or as an environment variable.
"""

import seqio

from tvq_t5x.data import indexed, vocabularies
from tvq_t5x.tasks import kjv  # pyright: ignore[reportMissingImports]

indexed.register(
  'kjv_sentencepiece',
  __name__,
  source=indexed.text_source(kjv.documents, tuple(kjv.SPLITS)),
  preprocessors=indexed.text_preprocessors(),
  output_features={'targets': seqio.Feature(vocabularies.SentencePieceVocabulary(), add_eos=True)},
  task_cls=indexed.InMemoryTask,
)
