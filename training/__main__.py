"""`python -m vreflection_training`: what `accelerate launch` starts in every process."""

import sys

from .cli import main


sys.exit(main())
