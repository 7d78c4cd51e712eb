"""Writing with a GPT: the cache of keys and values, sampling, beam search, text as it comes."""
