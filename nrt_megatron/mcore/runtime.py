"""Process groups, device, seeds and phases: everything a rank needs before it has a model."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import random
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from nrt_megatron.mcore import HAS_GPU
from nrt_megatron.mcore.heartbeats import Heartbeats, connect
from nrt_megatron.mcore.place import Place
from nrt_megatron.recipe import Recipe


@dataclass
class Runtime(Place):
    """One rank's place in training, and what it does."""

    timeout_s: float
    current_phase: str = "start"
    """What the rank is doing; named in the message when it fails or hangs."""
    heartbeats: Heartbeats = field(default_factory=Heartbeats)

    @property
    def is_main(self) -> bool:
        """The one rank that writes metrics and talks to the user."""
        return self.rank == 0

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Names what the rank does; a phase longer than the timeout ends the rank with every stack."""
        previous, self.current_phase = self.current_phase, name
        watchdog = threading.Timer(self.timeout_s, self._abort)
        watchdog.daemon = True
        watchdog.start()
        try:
            with self.heartbeats.section(name):
                yield
            self.current_phase = previous  # left as it was on failure, so that the message can name it
        finally:
            watchdog.cancel()

    def _abort(self) -> None:
        print(f"nrt: {self.whereabouts()} did not finish within {self.timeout_s:.0f} s", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr)
        os._exit(1)

    def whereabouts(self) -> str:
        """`rank 3 on node7, phase rollout`"""
        return f"rank {self.rank} on {socket.gethostname()}, phase {self.current_phase}"


def initialize(recipe: Recipe) -> Runtime:
    """Joins the process group named by the environment (torchrun's variables) and builds Megatron's groups.

    Without RANK in the environment the process is alone. Raises what torch.distributed raises when the
    rendezvous fails or times out.
    """
    cfg = recipe.policy.megatron_cfg
    timeout = timedelta(minutes=cfg.distributed_timeout_minutes)
    if HAS_GPU:
        # Where a launcher shows each rank its own GPU alone, that is device 0 whatever the rank.
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        # Ranks share the cores; repeats are identical with one thread only.
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    if not dist.is_initialized():
        backend = "nccl" if HAS_GPU else "gloo"
        if "RANK" in os.environ:
            # Not bound to the device (`device_id`): then NCCL would put a send or receive between two stages in one
            # line with every other operation of their group, and make all groups at once.
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=cfg.tensor_model_parallel_size,
        pipeline_model_parallel_size=cfg.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=cfg.virtual_pipeline_model_parallel_size,
        context_parallel_size=cfg.context_parallel_size,
        distributed_timeout_minutes=max(1, int(cfg.distributed_timeout_minutes)),
    )
    seed_everything(recipe.nrt.seed, cfg.deterministic_mode)
    return Runtime(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=device,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=cfg.tensor_model_parallel_size,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=cfg.pipeline_model_parallel_size,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=cfg.context_parallel_size,
        groups=ProcessGroupCollection.use_mpu_process_groups(),
        timeout_s=timeout.total_seconds(),
        heartbeats=connect(speaks=dist.get_rank() == 0),
    )


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seeds Python, numpy, torch and Megatron's per-rank states; optionally only deterministic kernels."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.utils.deterministic.fill_uninitialized_memory = False  # costs a fill of every buffer
        torch.use_deterministic_algorithms(True)


def shutdown() -> None:
    """Leaves the process groups; safe to call when there are none."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
