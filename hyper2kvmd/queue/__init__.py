"""The exports directory as a queue: the claim, the facts, the state that follows from them, and what people ask for."""
