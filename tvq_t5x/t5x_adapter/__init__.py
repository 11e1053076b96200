"""What T5X's programs need besides the model object; all modules here import T5X.

Optimizer and trainer, data of training and evaluation, export, InteractiveModel, paths.
"""
