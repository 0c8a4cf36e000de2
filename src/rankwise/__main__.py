"""`python -m rankwise`: the same as the program `rankwise`."""

from rankwise.cli import main

if __name__ == "__main__":
    main()
