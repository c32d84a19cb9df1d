"""GPT-2 training, fine-tuning, evaluation and sampling on hand-written kernels."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036  before what an older one cannot parse; this file is for any
    sys.exit("nanogpt needs Python >= 3.11, this is %d.%d.%d (%s)" % (sys.version_info[:3] + (sys.executable,)))  # noqa: RUF005, UP031
