"""The commands of `gptfast`, one module each. The engines are in the packages below."""
