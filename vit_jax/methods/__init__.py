"""Training methods: (state, batch) -> (state, metrics)."""
