"""GPU tests of a built library: plain pytest, nothing to install, skipped where there is no GPU."""
