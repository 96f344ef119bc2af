"""Frozen models for deployment: weights converted and folded once, and what a call need not compute left out."""
