"""Linux guests: what they boot, what that needs on new hardware, and the fixers that change it."""
