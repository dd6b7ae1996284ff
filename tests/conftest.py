"""Makes the modules at the root importable, and keeps TensorFlow quiet and off any accelerator's memory."""
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
sys.dont_write_bytecode = True

import commands  # noqa: E402, F401  (sets TensorFlow's log level before any test imports it)
