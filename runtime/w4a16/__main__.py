"""``python -m w4a16``: the program ``w4a16``."""

from w4a16.cli import main

if __name__ == "__main__":
    main()
