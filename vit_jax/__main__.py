"""`python -m vit_jax`: the same as `vit-jax`."""

import sys

from vit_jax.cli import main

sys.exit(main())
