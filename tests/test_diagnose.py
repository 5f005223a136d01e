"""Errors of the machine, the memory, other ranks, and those of the code or the data, told apart."""

import bdb
import errno
import http.client
import os
import socket
import ssl
import sys
import urllib.error
import urllib.request

import pytest
import requests
import torch
from torch.distributed import DistBackendError, DistStoreError

from tests.test_stop_signals import in_a_child
from train.command_line import exit_code_of
from train.exits import Exit, first_line, message_of, repr_of, traceback_of
from train.files import TooLargeError
from train.loop.failure import described
from train.process.diagnose import as_run_error, is_of_accelerator
from train.secrets import redact


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


def cut_download():
    """The error of a server that ends before it has sent all that it announced."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = http.client.HTTPConnection(*server.getsockname())
        client.request("GET", "/")
        connection, _ = server.accept()
        connection.recv(1 << 16)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf")
        connection.close()
        with pytest.raises(http.client.IncompleteRead) as error:
            client.getresponse().read()
        return error.value


def too_large():
    try:
        torch.empty(1 << 60)
    except RuntimeError as error:
        return error


def http_error(status):
    return urllib.error.HTTPError("http://x", status, "text", http.client.HTTPMessage(), None)


def nccl_error(kind, name, last):
    """The error that torch raises for one of NCCL's, with the three lines that it has."""
    return DistBackendError(
        f"NCCL error in: NCCLUtils.cpp:77, {kind} (run with NCCL_DEBUG=INFO for details), NCCL "
        f"version 2.27.5\nnccl{name}: What it is.\nLast error:\n{last}\n"
    )


def full_gpu(*, free="0 bytes", allocated="1.00 GiB", reserved="512.00 KiB", pools=""):
    """The error of torch's allocator for a GPU of 31.47 GiB."""
    return torch.OutOfMemoryError(
        f"CUDA out of memory. Tried to allocate 22.78 GiB. GPU 0 has a total capacity of 31.47 GiB "
        f"of which {free} is free. Process 7 has 18.73 GiB memory in use. Of the allocated memory "
        f"{allocated} is allocated by PyTorch,{pools} and {reserved} is reserved by PyTorch but "
        "unallocated. If reserved but unallocated memory is large try setting a variable."
    )


def raised_from(error, cause):
    """The error as ``raise error from cause`` leaves it."""
    error.__cause__ = cause
    return error


def circle():
    one, other = ValueError("one"), KeyError("other")
    one.__cause__, other.__cause__ = other, one
    return one


class WithoutText(Exception):
    """An error of the user's whose constructor and ``__str__`` do not fit together."""

    def __str__(self):
        return self.missing

    __repr__ = __str__


class WithoutResponse(ConnectionError):
    @property
    def response(self):
        raise RuntimeError("there was no response")


BROKEN_DISK = OSError(errno.EIO, "Input/output error")
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
    "FUSE whose process died": (OSError(errno.ENOTCONN, "not connected"), Exit.RETRY),
    "Lustre that evicted the host": (OSError(errno.ESHUTDOWN, "shutdown"), Exit.RETRY),
    "NFS without locks": (OSError(errno.ENOLCK, "No locks available"), Exit.RETRY),
    "a damaged file system": (OSError(errno.EUCLEAN, "needs cleaning"), Exit.RETRY),
    "an expired ticket": (OSError(errno.EKEYEXPIRED, "Key has expired"), Exit.RETRY),
    "the limit of processes": (BlockingIOError(errno.EAGAIN, "unavailable"), Exit.RETRY),
    "the limit of threads": (RuntimeError("can't start new thread"), Exit.RETRY),
    "a name server that does not answer": (socket.gaierror(-3, "Temporary failure"), Exit.RETRY),
    "a cut TLS connection": (ssl.SSLEOFError(8, "EOF occurred"), Exit.RETRY),
    "a wrong certificate": (ssl.SSLCertVerificationError(1, "self-signed"), None),
    "a cut download": (cut_download(), Exit.RETRY),
    "urllib": (refused_connection(urllib.request.urlopen), Exit.RETRY),
    "requests": (refused_connection(requests.get), Exit.RETRY),
    "a busy server": (http_error(429), Exit.RETRY),
    "a broken server": (http_error(503), Exit.RETRY),
    "a server that refuses": (http_error(404), None),
    "a file that does not exist": (FileNotFoundError(errno.ENOENT, "No such file"), None),
    "a file without permission": (PermissionError(errno.EACCES, "Permission denied"), None),
    "a name that is too long": (OSError(errno.ENAMETOOLONG, "File name too long"), Exit.USAGE),
    "a pipe that the code closed": (BrokenPipeError(errno.EPIPE, "Broken pipe"), None),
    "a file that is too large": (TooLargeError(errno.EFBIG, "it has 9 bytes", "x"), Exit.DATA),
    "no memory": (MemoryError(), Exit.OUT_OF_MEMORY),
    "no memory for a mapping": (OSError(errno.ENOMEM, "Cannot allocate"), Exit.OUT_OF_MEMORY),
    "no memory on the host": (too_large(), Exit.OUT_OF_MEMORY),
    "no memory on the device": (torch.OutOfMemoryError("CUDA out of memory"), Exit.OUT_OF_MEMORY),
    "a GPU that this run fills": (
        full_gpu(free="12.73 GiB", allocated="9.08 GiB"),
        Exit.OUT_OF_MEMORY,
    ),
    "a GPU that another process fills": (
        full_gpu(free="3.00 MiB", allocated="9.08 GiB", reserved="463.48 MiB"),
        Exit.RETRY,
    ),
    "a GPU that another process fills, with CUDA graphs": (
        full_gpu(pools=" with 1.00 GiB allocated in private pools (e.g., CUDA Graphs),"),
        Exit.RETRY,
    ),
    "no memory for CUDA": (RuntimeError("CUDA error: out of memory"), Exit.OUT_OF_MEMORY),
    "no memory for cuBLAS": (
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        Exit.OUT_OF_MEMORY,
    ),
    "no memory for cuDNN": (
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        Exit.OUT_OF_MEMORY,
    ),
    "no memory for cuDNN 9": (
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        Exit.OUT_OF_MEMORY,
    ),
    "no memory for the handle of cuBLAS": (
        RuntimeError(
            "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"
        ),
        Exit.OUT_OF_MEMORY,
    ),
    "cuBLAS that fails in a multiplication": (
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( ...)`"),
        None,
    ),
    "no memory for cuSOLVER": (
        RuntimeError(
            "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"
        ),
        Exit.OUT_OF_MEMORY,
    ),
    "no memory for cuSPARSE": (
        RuntimeError(
            "CUDA error: CUSPARSE_STATUS_INSUFFICIENT_RESOURCES when calling `cusparseX()`"
        ),
        Exit.OUT_OF_MEMORY,
    ),
    "no memory for cuFFT": (RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"), Exit.OUT_OF_MEMORY),
    "no memory for the driver": (
        RuntimeError("CUDA driver error: out of memory"),
        Exit.OUT_OF_MEMORY,
    ),
    "no memory for Triton": (
        RuntimeError("Triton Error [CUDA]: out of memory"),
        Exit.OUT_OF_MEMORY,
    ),
    "no memory in a compiled model": (
        RuntimeError("backend='inductor' raised:\nOutOfMemoryError: CUDA out of memory. Tried to"),
        Exit.OUT_OF_MEMORY,
    ),
    "no memory for an older NCCL": (
        nccl_error("unhandled cuda error", "UnhandledCudaError", "Cuda failure 'out of memory'"),
        Exit.OUT_OF_MEMORY,
    ),
    "no memory for NCCL": (
        nccl_error("unhandled cuda error", "UnhandledCudaError", "Cuda failure 2 'out of memory'"),
        Exit.OUT_OF_MEMORY,
    ),
    "a GPU with two ranks": (
        nccl_error(
            "invalid usage",
            "InvalidUsage",
            "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000",
        ),
        Exit.USAGE,
    ),
    "full shared memory of NCCL": (
        nccl_error(
            "unhandled system error",
            "SystemError",
            "Error while creating shared memory segment /dev/shm/nccl-x (size 9637888), error: "
            "No space left on device (28)",
        ),
        Exit.RETRY,
    ),
    "a GPU that NCCL finds broken": (
        nccl_error(
            "unhandled cuda error", "UnhandledCudaError", "Cuda failure 999 'unknown error'"
        ),
        Exit.RETRY,
    ),
    "a GPU with broken memory": (
        RuntimeError("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might"),
        Exit.RETRY,
    ),
    "a GPU that is taken": (
        RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable"),
        Exit.RETRY,
    ),
    "a GPU that is taken, of CUDA 12": (
        RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"),
        Exit.RETRY,
    ),
    "an index that the code got wrong": (
        RuntimeError("CUDA error: device-side assert triggered"),
        None,
    ),
    "another rank that ended": (DistBackendError("NCCL communicator was aborted"), Exit.RETRY),
    "another rank that NCCL lost": (
        nccl_error("remote process exited or there was a network error", "RemoteError", "socketX"),
        Exit.RETRY,
    ),
    "another rank that reset a connection": (
        nccl_error("unhandled system error", "SystemError", "Connection reset by peer"),
        Exit.RETRY,
    ),
    "a store that ended": (DistStoreError("wait timeout after 1000ms"), Exit.RETRY),
    "an error that a library raises from that of a disk": (
        raised_from(ValueError("cannot decode a.png"), raised_from(KeyError("a"), BROKEN_DISK)),
        Exit.RETRY,
    ),
    "an error that the code raises from one without memory": (
        raised_from(ValueError("the step failed"), torch.OutOfMemoryError("CUDA out of memory")),
        Exit.OUT_OF_MEMORY,
    ),
    "a group of errors of a disk": (
        ExceptionGroup("two reads", [BROKEN_DISK, ExceptionGroup("one", [BROKEN_DISK])]),
        Exit.RETRY,
    ),
    "a group with a bug": (ExceptionGroup("two reads", [BROKEN_DISK, KeyError("b")]), None),
    "errors that name each other as the cause": (circle(), None),
    "an error without a text": (WithoutText(), None),
    "an error of a network whose response cannot be read": (WithoutResponse("x"), Exit.RETRY),
    "a bug": (ValueError("No space left on device"), None),
    "another bug": (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_each_cause_has_its_exit_code(cause):
    error, code = CAUSES[cause]
    found = as_run_error(error)
    assert (found and found.code) == code
    assert found is None or "\n" not in str(found)


@pytest.mark.parametrize(
    ("cause", "said"),
    [
        ("no memory for NCCL", "(Cuda failure 2 'out of memory')"),
        ("a GPU with two ranks", "Two ranks have the same GPU (Duplicate GPU detected"),
        ("full shared memory of NCCL", "/dev/shm/nccl-x"),
        ("a GPU that NCCL finds broken", "Cuda failure 999 'unknown error'"),
        ("another rank that NCCL lost", "Another rank has ended"),
        ("another rank that reset a connection", "Another rank has ended"),
        ("another rank that ended", "Another rank has ended"),
    ],
)
def test_the_reason_of_an_error_of_nccl_is_its_last_error(cause, said):
    assert said in str(as_run_error(CAUSES[cause][0]))


def test_an_error_and_what_it_was_raised_from_are_told():
    cause, _ = CAUSES["an error that a library raises from that of a disk"]
    assert str(as_run_error(cause)) == (
        "ValueError: cannot decode a.png: [Errno 5] Input/output error. Fix the cause, then rerun."
    )


def test_a_fault_of_the_machine_ends_any_command_with_one_line(capsys):
    """As the agent, if the disk for its logs is full."""

    def fail():
        raise OSError(errno.ENOSPC, "No space left on device", "/tmp/x")

    assert exit_code_of(fail) == 75
    (line,) = capsys.readouterr().err.splitlines()
    assert "No space left on device" in line


def test_an_error_without_a_text_is_described():
    assert described(WithoutText()) == (
        Exit.INTERNAL,
        "WithoutText: WithoutText, whose str() fails with AttributeError",
    )
    assert "WithoutText" in repr_of(WithoutText())


def test_an_error_that_quotes_a_data_set_is_shortened_between_words():
    """To search it for secrets would take minutes."""
    key = "AKIA" + "IOSFODNN7EXAMPLE"
    error = ValueError(f"cannot parse {key} " * 2**20)
    _, text = described(error)
    assert len(text) < 3_000
    assert text.startswith("ValueError: cannot parse")
    assert "characters) ..." in text
    for told in (text, redact(traceback_of(error)), redact(message_of(error))):
        assert "AKIA" not in told
        assert "EXAMPLE" not in told
    assert len(first_line(ValueError("x" * 2**20))) < 3_000


def test_the_memory_of_other_processes_is_named():
    text = str(as_run_error(CAUSES["a GPU that another process fills"][0]))
    assert "other processes use about 21.9 of 31.5 GiB" in text


def test_a_debugger_that_ends_is_told_without_a_traceback():
    class Quits(bdb.Bdb):
        def user_line(self, frame):
            self.set_quit()

    def with_a_breakpoint():
        Quits().set_trace()
        pass  # the debugger stops here

    tracer = sys.gettrace()  # of coverage.py
    with pytest.raises(bdb.BdbQuit) as error:
        with_a_breakpoint()
    sys.settrace(tracer)
    known = as_run_error(error.value)
    assert known.code == 70
    assert "The debugger has ended in test_diagnose.py:" in str(known)
    assert "Remove the breakpoint" in str(known)


class NotFreed:
    """As a tensor of a GPU after a failed kernel."""

    def __del__(self):
        os.abort()


def failing_kernel():
    tensor = NotFreed()
    try:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")
    except RuntimeError as error:
        raise KeyError(str(tensor)) from error


@pytest.mark.process
def test_tensors_that_cannot_be_freed_do_not_change_the_exit_code(monkeypatch, capfd):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    code, err = in_a_child(lambda: exit_code_of(failing_kernel), capfd)
    assert code == Exit.INTERNAL
    assert "device-side assert" in err


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), True),
        (nccl_error("unhandled cuda error", "x", "Cuda failure 710 'device-side assert'"), True),
        (raised_from(ValueError("x"), torch.AcceleratorError("HIP error: x")), True),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("CUDA error: x"), False),
        (circle(), False),
    ],
)
def test_errors_after_which_the_gpu_cannot_be_used(monkeypatch, error, expected):
    assert not is_of_accelerator(error)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert is_of_accelerator(error) is expected
