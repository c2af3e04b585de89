"""`python -m lcx` is the command `lcx`."""

from .cli import main

main()
