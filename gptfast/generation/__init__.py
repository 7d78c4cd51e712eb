"""Text generation: KV cache, sampling, speculative decoding, beam search and streaming."""
