"""``python -m inmerge_wrap.cli``."""

from inmerge_wrap.cli import main

if __name__ == "__main__":
    main()
