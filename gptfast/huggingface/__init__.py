"""Models and tokenizers in the files that Hugging Face's libraries read and write."""
