"""Batches and texts: SeqIO tasks read by index, token caches, vocabularies."""
