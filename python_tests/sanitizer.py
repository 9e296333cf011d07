"""Whether a sanitizer watches this run, as `make sanitize` has it."""

import os

SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")
