"""A study of FP16 x INT4 decode kernels for Hopper; see ../NOTES.md. Not part of the library."""
