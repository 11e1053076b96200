"""The runner for one machine, behind `python -m tvq_t5x.train`."""
