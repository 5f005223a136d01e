"""Errors of the machine, the memory, other ranks, and those of the code or the data, told apart."""

import errno
import http.client
import socket
import urllib.error
import urllib.request

import pytest
import requests
import torch
from torch.distributed import DistBackendError, DistStoreError

from train.exits import Exit
from train.files import TooLargeError
from train.process.diagnose import as_run_error


def refused_connection(call):
    """The error of a library for a port that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/x"
        try:
            call(url)
        except Exception as error:
            return error
    raise AssertionError("the connection was accepted")


def too_large():
    try:
        torch.empty(1 << 60)
    except RuntimeError as error:
        return error


def http_error(status):
    return urllib.error.HTTPError("http://x", status, "text", http.client.HTTPMessage(), None)


CAUSES = {
    "a full disk": (OSError(errno.ENOSPC, "No space left on device"), Exit.RETRY),
    "a quota": (OSError(errno.EDQUOT, "Disk quota exceeded"), Exit.RETRY),
    "a broken disk": (OSError(errno.EIO, "Input/output error"), Exit.RETRY),
    "a file server that restarted": (OSError(errno.ESTALE, "Stale file handle"), Exit.RETRY),
    "too many open files": (OSError(errno.EMFILE, "Too many open files"), Exit.RETRY),
    "full shared memory": (
        RuntimeError("unable to write to file </torch_7_1>: No space left on device (28)"),
        Exit.RETRY,
    ),
    "a library in Rust": (RuntimeError("I/O error: Input/output error (os error 5)"), Exit.RETRY),
    "a time limit": (TimeoutError("timed out"), Exit.RETRY),
    "a host that cannot be reached": (OSError(errno.EHOSTUNREACH, "No route"), Exit.RETRY),
    "urllib": (refused_connection(urllib.request.urlopen), Exit.RETRY),
    "requests": (refused_connection(requests.get), Exit.RETRY),
    "a busy server": (http_error(429), Exit.RETRY),
    "a broken server": (http_error(503), Exit.RETRY),
    "a server that refuses": (http_error(404), None),
    "a file that does not exist": (FileNotFoundError(errno.ENOENT, "No such file"), None),
    "a file without permission": (PermissionError(errno.EACCES, "Permission denied"), None),
    "a pipe that the code closed": (BrokenPipeError(errno.EPIPE, "Broken pipe"), None),
    "a file that is too large": (TooLargeError(errno.EFBIG, "it has 9 bytes", "x"), Exit.DATA),
    "no memory": (MemoryError(), Exit.OUT_OF_MEMORY),
    "no memory for a mapping": (OSError(errno.ENOMEM, "Cannot allocate"), Exit.OUT_OF_MEMORY),
    "no memory on the host": (too_large(), Exit.OUT_OF_MEMORY),
    "no memory on the device": (torch.OutOfMemoryError("CUDA out of memory"), Exit.OUT_OF_MEMORY),
    "no memory for CUDA": (RuntimeError("CUDA error: out of memory"), Exit.OUT_OF_MEMORY),
    "no memory for cuBLAS": (
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        Exit.OUT_OF_MEMORY,
    ),
    "no memory for cuDNN": (
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        Exit.OUT_OF_MEMORY,
    ),
    "no memory for NCCL": (
        DistBackendError("NCCL error: unhandled cuda error ... Cuda failure 'out of memory'"),
        Exit.OUT_OF_MEMORY,
    ),
    "another rank that ended": (DistBackendError("NCCL communicator was aborted"), Exit.RETRY),
    "a store that ended": (DistStoreError("wait timeout after 1000ms"), Exit.RETRY),
    "a bug": (ValueError("No space left on device"), None),
    "another bug": (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_each_cause_has_its_exit_code(cause):
    error, code = CAUSES[cause]
    found = as_run_error(error)
    assert (found and found.code) == code
    assert found is None or "\n" not in str(found)
