"""Looking at models, batches and features."""
