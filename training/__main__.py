"""`python -m vreflection_training RECIPE`: what `accelerate launch` starts in every process."""

import sys

from .entry import main_train


sys.exit(main_train())
