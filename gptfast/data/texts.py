"""Texts of a few sentences that come with the package: small enough that a small model learns them by heart."""

from __future__ import annotations

TEXTS = {
    # how a chatbot introduces itself
    "chatbot": """\
Hello, how are you today? I am a chatbot designed to assist you.
You can ask me about machine learning, artificial intelligence, and programming.
""",
    # another domain, for fine-tuning: as many bytes, and as many tokens of GPT-2
    "clinic": """\
The patient came to the clinic with a high fever and a dry cough.
The doctor listened to her lungs, took her blood pressure, and prescribed rest.
""",
    # three sentences of words
    "sentences": """\
The quick brown fox jumps over the lazy dog.
This is an example of a small dataset for training a GPT model.
We are building a transformer-based architecture.
""",
}
