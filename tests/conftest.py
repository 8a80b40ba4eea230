"""Settings of every test: offline, one thread, quiet, and no file left in the user's cache."""

import os
import tempfile

# Read when transformers is imported, so set before anything imports it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
_modules_cache = tempfile.TemporaryDirectory(prefix="uground-modules-")
os.environ["HF_MODULES_CACHE"] = _modules_cache.name

import torch  # noqa: E402
import transformers  # noqa: E402

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
