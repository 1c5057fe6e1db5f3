"""`python -m bimos.comparison JOB.json make evaluate`: one row; see `work.py`."""

from bimos.cli.group import quiet

if __name__ == "__main__":
    quiet()  # before the libraries are imported
    from bimos.comparison.work import main

    main()
