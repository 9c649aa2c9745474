"""The only room that imports Megatron-Core.

Importing this package installs the CPU adapter first where the machine has no GPU: Megatron binds
`torch.cuda` names when its modules load, so the order matters. With a GPU the adapter module is not
even imported.
"""

import logging
import os
import warnings

import torch

# Megatron warns once per optional kernel library that is absent; which layers run is said in one line by
# `MegatronPolicy.layers`.
warnings.filterwarnings("ignore", module=r"megatron\..*")
warnings.filterwarnings("ignore", message=r".*(Transformer Engine|Apex|apex).*")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")  # Megatron's calls
logging.getLogger("megatron").setLevel(logging.ERROR)

# Torch's own switch: no call of `torch.load`, Megatron's included, unpickles more than tensors, plain values and the
# classes that Megatron has declared safe.
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"

# The variable first: a process that has asked for GPUs cannot fork ranks that use them.
HAS_GPU = os.environ.get("NRT_DEVICE", "") != "cpu" and torch.cuda.is_available()

if not HAS_GPU:
    from nrt_megatron.mcore import cpu

    cpu.install()
