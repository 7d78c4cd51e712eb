"""What stands for nanoGPT: a script in the place of train.py, and a text to train on."""

TEXT = "To be, or not to be: that is the question.\n" * 200
# stands for train.py: it takes the settings, and prints what the real one would
TRAIN = """\
import os, sys
settings = dict(word[2:].split("=") for word in sys.argv[2:])
print("tokens per iteration will be: 768")
print("found vocab_size = 18 (inside data/shakespeare_char/meta.pkl)")
for number in range(int(settings["max_iters"]) + 1):
    if number % int(settings["eval_interval"]) == 0:
        print(f"step {number}: train loss 2.0000, val loss {3 - number / 1000:.4f}")
    print(f"iter {number}: loss 2.5000, time 10.00ms, mfu -100.00%")
open("threads", "w").write(str(os.environ.get("OMP_NUM_THREADS")))
"""
