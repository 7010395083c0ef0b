"""The app on Hugging Face Spaces, of the model that the variable DDT_CHECKPOINT names."""

import os
import sys

from scripts.app.__main__ import main

sys.argv[1:] = [f"ckpt={os.environ.get('DDT_CHECKPOINT', 'ddt-xl-256')}", "host=0.0.0.0", *sys.argv[1:]]
main()
