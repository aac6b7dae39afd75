"""Checkpoint formats: what their tensors are called, how they lie, and what their numbers mean."""
