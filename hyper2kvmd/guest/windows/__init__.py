"""Windows guests: what they are, what has to change in them, and the proof that it did."""
