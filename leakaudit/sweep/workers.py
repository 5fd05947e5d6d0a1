"""The processes of a sweep: how they begin, and what is imported once for all of them.

Importing torch, torchvision, LPIPS and the rest costs a process seconds.  On Linux a server imports them once, beside
the sweep's own start, and each worker is forked from it with all of that in place, sharing its memory until it writes
there.  The server does nothing but import: nothing is computed in it, so that torch's thread pools and CUDA have not
begun, and forking it is safe where forking the sweep would not be.  (OpenBLAS, of numpy and scipy, begins its
threads when it is imported, and sees to forks itself.)  With a GPU, and elsewhere than on Linux, workers are spawned.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from multiprocessing.context import BaseContext
from signal import SIG_IGN, SIGINT, signal

from leakaudit.sweep.config import SweepConfig

FORKS = sys.platform == "linux"
GPU_DRIVERS = ("/dev/nvidiactl", "/dev/kfd")
"""Files of NVIDIA's and AMD's drivers on Linux."""

_SHARED = ("leakaudit.sweep.jobs", "leakaudit.sweep.target_jobs")
IMAGES = (*_SHARED, "leakaudit.media.images", "leakaudit.perceptual", "torch._dynamo")
"""What workers on images will import; torch's optimisers import its compiler."""
TEXT = (*_SHARED, "leakaudit.media.text", "leakaudit.models.pretrained", "torch._dynamo")


def begin_importing(config: SweepConfig) -> None:
    """Start the server that the sweep's workers will be forked from, if they will be, and return while it imports.

    It stays as long as this process does; where there is one already, it is left as it is.
    """
    if FORKS and config.engine == "local" and config.workers != 0 and not _may_use_gpu(config.device):
        from multiprocessing.forkserver import ensure_running, set_forkserver_preload  # not on Windows

        set_forkserver_preload(list(TEXT if config.text is not None else IMAGES))
        ensure_running()


def _may_use_gpu(device: str) -> bool:
    """Asked of the system's files: torch, who knows, is not imported yet."""
    return device.startswith("cuda") or (device == "auto" and any(map(os.path.exists, GPU_DRIVERS)))


def new_executor(threads: int, gpu: int | None) -> ProcessPoolExecutor:
    """One process of `threads` threads, begun with the first job; on GPU number `gpu` unless None."""
    context: BaseContext = get_context("forkserver" if FORKS and gpu is None else "spawn")
    return ProcessPoolExecutor(
        1, mp_context=context, initializer=_prepare, initargs=(threads, gpu, dict(os.environ))
    )


def _prepare(threads: int, gpu: int | None, environment: dict[str, str]) -> None:
    """Make a worker: it leaves Ctrl-C to the sweep, and ends with it.

    `environment` is the sweep's; that of the server may be older.
    """
    signal(SIGINT, SIG_IGN)
    os.environ.clear()
    os.environ.update(environment)
    if gpu is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu] if visible else str(gpu)
    warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated", category=FutureWarning)
    threading.Thread(target=_follow_parent, daemon=True).start()
    import torch  # after CUDA_VISIBLE_DEVICES; and the sweep begins its server before it imports torch itself

    torch.set_num_threads(threads)


def _follow_parent() -> None:
    """A sweep that was killed leaves no worker behind, who would go on writing into its folder."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
