"""Training: DeiT's recipe from a configuration to a run folder.

config -> datasets, sampling -> models, optimization -> engine -> checkpoints, reporting; run.py strings them together, and
command_train.py and command_eval.py are its command line.
"""
