"""The name of the token between documents."""

END_OF_TEXT = "<|endoftext|>"
