"""Models over several machines: the devices of ggml-rpc-server processes, next to this machine's own.

llama.cpp ends the whole process where there is no server or one that speaks another version of its protocol
(`rpc_dispatcher::start` in ggml/src/ggml-rpc/ggml-rpc.cpp), so each is greeted before llama.cpp gets it.
"""

from __future__ import annotations

import ctypes
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Any

from alignez_gguf.errors import RuntimeUnavailableError
from alignez_gguf.runtime import bindings

PROTOCOL = (7, 0)
"""Major and minor version that the pinned llama.cpp speaks; a server of a later minor one is refused."""

_TIMEOUT_S = 5
_CAPABILITIES = 24
_HELLO = struct.pack(f"=BQ{_CAPABILITIES}x", 14, _CAPABILITIES)
"""RPC_CMD_HELLO, the size of what follows, and no transport but TCP."""

_in_use: set[str] = set()
"""Endpoints that llama.cpp has; it may be connected to them, and a server serves one client at a time."""


def use_servers(endpoints: str | Sequence[str]) -> None:
    """Let every model that is loaded from now on, with `n_gpu_layers=-1`, be spread over RPC servers.

    What goes over the wire is neither encrypted nor authenticated, and whoever reaches a server can run code
    there: use it on networks that you trust alone.

    Args:
        endpoints: HOST:PORT of each server, in a sequence or with commas between them.

    Raises:
        RuntimeUnavailableError: the loaded llama.cpp has no RPC, or a server cannot be used.
    """
    names = endpoints.split(",") if isinstance(endpoints, str) else endpoints
    add_server, register = _functions()
    for name in map(str.strip, names):
        if name in _in_use:
            continue
        _check(name)
        registry = add_server(name.encode())
        if not registry:
            raise RuntimeUnavailableError(f"the RPC server {name} offers no device; start it with --device")
        register(registry)
        _in_use.add(name)


def _check(endpoint: str) -> None:
    """Raise where there is no server that llama.cpp can use."""
    host, _, port = endpoint.rpartition(":")
    if not host or ":" in host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise RuntimeUnavailableError(f"{endpoint!r} is no RPC server; write HOST:PORT")
    try:
        version = _greet(host, int(port))
    except TimeoutError as error:
        raise RuntimeUnavailableError(
            f"the RPC server {endpoint} does not answer within {_TIMEOUT_S} s; it serves one client at a "
            "time, so end the other one, or start another server"
        ) from error
    except OSError as error:
        raise RuntimeUnavailableError(
            f"there is no RPC server at {endpoint} ({error.strerror or error}); start ggml-rpc-server there"
        ) from error
    if version[0] != PROTOCOL[0] or version[1] > PROTOCOL[1]:
        raise RuntimeUnavailableError(
            f"the RPC server {endpoint} speaks version {version[0]}.{version[1]}, not "
            f"{PROTOCOL[0]}.{PROTOCOL[1]}; build it from the same source: tools/build_llama_tools.py"
        )


def _greet(host: str, port: int) -> tuple[int, int]:
    """The protocol version of a server. Raises `OSError` where there is none."""
    with (
        socket.create_connection((host, port), _TIMEOUT_S) as connection,
        connection.makefile("rb") as answer,
    ):
        connection.sendall(_HELLO)
        head = answer.read(8 + 2)
    if len(head) < 8 + 2:
        raise ConnectionError("it ended the conversation")
    _, major, minor = struct.unpack("=QBB", head)
    return major, minor


def _functions() -> tuple[Callable[[bytes], Any], Callable[[Any], None]]:
    """`ggml_backend_rpc_add_server` and `ggml_backend_register`."""
    ggml = bindings.ggml()
    pointer, text = ctypes.c_void_p, ctypes.c_char_p
    backend = bindings.declared(ggml.ggml_backend_reg_by_name, pointer, text)(b"RPC")
    if not backend:
        raise RuntimeUnavailableError(
            "the installed llama-cpp-python was built without RPC; run: alignez-gguf runtime build --rpc"
        )
    address_of = bindings.declared(ggml.ggml_backend_reg_get_proc_address, pointer, pointer, text)
    add_server = ctypes.CFUNCTYPE(pointer, text)(address_of(backend, b"ggml_backend_rpc_add_server"))
    return add_server, bindings.declared(ggml.ggml_backend_register, None, pointer)
