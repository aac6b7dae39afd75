"""The real command, ``python -m pipeline``, on the miniature upstream."""
