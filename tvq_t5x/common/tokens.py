"""Token ids that mean the same in every vocabulary of this package."""

PAD = 0
EOS = 1  # Ends a document, and stands before the first token of a sequence.
# The ids of `seqio.ByteVocabulary` below this one are padding, EOS and unknown.
FIRST_BYTE = 3
