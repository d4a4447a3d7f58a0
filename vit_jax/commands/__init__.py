"""The sub-commands of `vit-jax`, a file for each group: `add_to` says their flags, thin functions do the work."""
