"""`python -m fourfold`."""

from fourfold.cli.app import main

if __name__ == "__main__":
    main()
