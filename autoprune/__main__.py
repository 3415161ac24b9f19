"""`python -m autoprune`, the same as the `autoprune` command."""

from .cli import main

if __name__ == "__main__":
    main()
