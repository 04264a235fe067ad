"""`python -m sweep <verb>`: the same as the console script `sweep`."""

from sweep.cli.app import main

if __name__ == "__main__":
    main()
