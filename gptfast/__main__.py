"""`python -m gptfast` runs the command line, as `gptfast` does."""

from gptfast.cli import program

program()
