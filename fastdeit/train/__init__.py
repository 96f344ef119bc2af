"""Training: DeiT's recipe from a configuration to a run folder.

config -> datasets, sampling -> models, optimization -> engine -> checkpoints, reporting; run.py combines them, and
`fastdeit.commands` is its command line.
"""
