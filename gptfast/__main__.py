"""`python -m gptfast` is the same as `gptfast`."""

from gptfast.cli import program

program()
