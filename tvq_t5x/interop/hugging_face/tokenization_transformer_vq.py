"""Texts as the tokens of a Transformer-VQ model: bytes, or the pieces of `sentencepiece.model`.

Ids are 0 for padding, 1 for the end of a document and 2 for unknown; a byte has its value plus 3.
As the end of the one before begins a document, each text begins with 1.
"""

import os
import shutil
from typing import Any

from transformers import PreTrainedTokenizer

FIRST_BYTE = 3
SENTENCEPIECE = 'sentencepiece.model'


class TransformerVQTokenizer(PreTrainedTokenizer):
  """Bytes, or the pieces of a SentencePiece model, which needs the package `sentencepiece`.

  Tokens are shown as the id in brackets: a piece may be part of a character.
  """

  vocab_files_names = {'vocab_file': SENTENCEPIECE}
  model_input_names = ['input_ids', 'attention_mask']
  padding_side = 'left'

  def __init__(self, vocab_file: str | None = None, **kwargs: Any):
    """Reads the SentencePiece model, if there is one; the rest is as of every tokenizer."""
    self.vocab_file, self._pieces = vocab_file, None
    if vocab_file is not None:
      import sentencepiece

      self._pieces = sentencepiece.SentencePieceProcessor(vocab_file)
    # Text that reads like a special token is text.
    kwargs |= {'split_special_tokens': True, 'clean_up_tokenization_spaces': False}
    for name, token in (('pad_token', 0), ('eos_token', 1), ('bos_token', 1), ('unk_token', 2)):
      kwargs[name] = f'<{token}>'
    super().__init__(**kwargs)

  @property
  def vocab_size(self) -> int:
    """Ids."""
    return FIRST_BYTE + 256 if self._pieces is None else self._pieces.get_piece_size()

  def get_vocab(self) -> dict[str, int]:
    """All tokens and their ids."""
    return {f'<{i}>': i for i in range(self.vocab_size)} | dict(self.added_tokens_encoder)

  def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
    if self._pieces is None:
      ids = [byte + FIRST_BYTE for byte in text.encode()]
    else:
      ids = self._pieces.encode(text)
    return [f'<{i}>' for i in ids]

  def _convert_token_to_id(self, token: str) -> int:
    return int(token[1:-1])

  def _convert_id_to_token(self, index: int) -> str:
    return f'<{index}>'

  def convert_tokens_to_string(self, tokens: list[str]) -> str:
    """The text of tokens; bytes that are no UTF-8 become U+FFFD, the end of a document nothing."""
    ids = [int(token[1:-1]) for token in tokens]
    if self._pieces is None:
      values = (i - FIRST_BYTE for i in ids)
      return bytes(i for i in values if 0 <= i < 256).decode(errors='replace')
    return self._pieces.decode(ids)

  def build_inputs_with_special_tokens(
    self, token_ids_0: list[int], token_ids_1: list[int] | None = None
  ) -> list[int]:
    """The tokens of a text after 1, those of a second text after another one."""
    second = [] if token_ids_1 is None else [self.bos_token_id, *token_ids_1]
    return [self.bos_token_id, *token_ids_0, *second]

  def save_vocabulary(
    self, save_directory: str, filename_prefix: str | None = None
  ) -> tuple[str, ...]:
    """Copies the SentencePiece model, if there is one."""
    if self.vocab_file is None:
      return ()
    prefix = '' if filename_prefix is None else f'{filename_prefix}-'
    target = os.path.join(save_directory, f'{prefix}{SENTENCEPIECE}')
    if os.path.abspath(target) != os.path.abspath(self.vocab_file):
      shutil.copyfile(self.vocab_file, target)
    return (target,)
