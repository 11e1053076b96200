"""Generating and scoring with the parameters of a checkpoint."""
