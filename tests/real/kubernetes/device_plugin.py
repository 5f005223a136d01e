"""A device plugin that pretends to GPUs, so that a real scheduler and kubelet place GPU runs.

The messages are those of the kubelet's API for device plugins, v1beta1, with the fields that are
used here.
"""

import queue
from concurrent.futures import ThreadPoolExecutor

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

RESOURCE = "nvidia.com/gpu"
_STRING, _MESSAGE, _MAP = "string", "message", "map"
_MESSAGES = {
    "Empty": {},
    "Options": {},
    "RegisterRequest": {
        "version": (1, _STRING),
        "endpoint": (2, _STRING),
        "resource_name": (3, _STRING),
    },
    "Device": {"ID": (1, _STRING), "health": (2, _STRING)},
    "Devices": {"devices": (1, "Device")},
    "Wanted": {"devices_ids": (1, _STRING)},
    "AllocateRequest": {"container_requests": (1, "Wanted")},
    "Pair": {"key": (1, _STRING), "value": (2, _STRING)},
    "Given": {"envs": (1, "Pair")},
    "AllocateResponse": {"container_responses": (1, "Given")},
}
_REPEATED = {"devices", "devices_ids", "container_requests", "container_responses", "envs"}


def _classes():
    file = descriptor_pb2.FileDescriptorProto(
        name="isorun_device_plugin.proto", package="v1beta1", syntax="proto3"
    )
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            made = message.field.add(name=field, number=number)
            made.label = made.LABEL_REPEATED if field in _REPEATED else made.LABEL_OPTIONAL
            made.type = made.TYPE_STRING if kind == _STRING else made.TYPE_MESSAGE
            if kind != _STRING:
                made.type_name = f".v1beta1.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"v1beta1.{name}"))
        for name in _MESSAGES
    }


M = _classes()


class FakeGpus:
    """GPUs of one node, until the context is left. ``folder`` has the kubelet's socket."""

    def __init__(self, folder, count):
        self._folder, self._ids = folder, [f"gpu-{number}" for number in range(count)]
        self._ended = queue.Queue()

    def __enter__(self):
        self._server = grpc.server(ThreadPoolExecutor(4))
        service = grpc.method_handlers_generic_handler("v1beta1.DevicePlugin", {
            "GetDevicePluginOptions": _unary(lambda *_: M["Options"](), "Empty"),
            "ListAndWatch": grpc.unary_stream_rpc_method_handler(
                self._list, M["Empty"].FromString, lambda m: m.SerializeToString()
            ),
            "Allocate": _unary(self._allocate, "AllocateRequest"),
        })  # fmt: skip
        self._server.add_generic_rpc_handlers([service])
        name = "isorun-test.sock"
        self._server.add_insecure_port(f"unix:{self._folder / name}")
        self._server.start()
        request = M["RegisterRequest"](version="v1beta1", endpoint=name, resource_name=RESOURCE)
        with grpc.insecure_channel(f"unix:{self._folder / 'kubelet.sock'}") as channel:
            register = channel.unary_unary(
                "/v1beta1.Registration/Register",
                request_serializer=lambda m: m.SerializeToString(),
                response_deserializer=M["Empty"].FromString,
            )
            register(request, timeout=30)
        return self

    def __exit__(self, *_):
        self._ended.put(None)
        self._server.stop(1).wait()

    def _list(self, _request, _context):
        yield M["Devices"](devices=[M["Device"](ID=each, health="Healthy") for each in self._ids])
        self._ended.get()

    def _allocate(self, request, _context):
        given = []
        for each in request.container_requests:
            value = ",".join(sorted(each.devices_ids))
            given.append(M["Given"](envs=[M["Pair"](key="FAKE_GPUS", value=value)]))
        return M["AllocateResponse"](container_responses=given)


def _unary(function, request):
    return grpc.unary_unary_rpc_method_handler(
        function, M[request].FromString, lambda m: m.SerializeToString()
    )
