"""Frozen models for deployment: weights are converted and folded once, and calls compute only what the logits depend on."""
