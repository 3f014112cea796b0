"""How fast a pruned model is: its matrices one by one, and decoding."""
