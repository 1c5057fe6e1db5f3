"""`python -m bimos`."""

from bimos.cli import main

if __name__ == "__main__":
    main()
