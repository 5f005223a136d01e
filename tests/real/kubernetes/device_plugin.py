"""A device plugin that pretends to GPUs, so that a real scheduler and kubelet place GPU runs.

The messages are those of the kubelet's APIs for the registration of plugins, v1, and for device
plugins, v1beta1, with the fields that are used here. The kubelet watches the folder for sockets.
"""

import queue
from concurrent.futures import ThreadPoolExecutor

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

RESOURCE = "nvidia.com/gpu"
_STRING = "string"
_MESSAGES = {
    "Empty": {},
    "Options": {},
    "Info": {
        "type": (1, _STRING), "name": (2, _STRING), "endpoint": (3, _STRING),
        "supported_versions": (4, _STRING),
    },
    "Device": {"ID": (1, _STRING), "health": (2, _STRING)},
    "Devices": {"devices": (1, "Device")},
    "Wanted": {"devices_ids": (1, _STRING)},
    "AllocateRequest": {"container_requests": (1, "Wanted")},
    "Pair": {"key": (1, _STRING), "value": (2, _STRING)},
    "Given": {"envs": (1, "Pair")},
    "AllocateResponse": {"container_responses": (1, "Given")},
}  # fmt: skip
_REPEATED = {
    "supported_versions",
    "devices",
    "devices_ids",
    "container_requests",
    "container_responses",
    "envs",
}


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
    """GPUs of one node, until the context is left. ``folder``: the kubelet's plugins_registry."""

    def __init__(self, folder, count):
        self._socket = folder / "isorun-test.sock"
        self._ids = [f"gpu-{number}" for number in range(count)]
        self._ended = queue.Queue()

    def __enter__(self):
        self._server = grpc.server(ThreadPoolExecutor(4))
        registration = {
            "GetInfo": _unary(self._info, "Empty"),
            "NotifyRegistrationStatus": _unary(lambda *_: M["Empty"](), "Empty"),
        }
        plugin = {
            "GetDevicePluginOptions": _unary(lambda *_: M["Options"](), "Empty"),
            "ListAndWatch": grpc.unary_stream_rpc_method_handler(
                self._list, M["Empty"].FromString, lambda m: m.SerializeToString()
            ),
            "Allocate": _unary(self._allocate, "AllocateRequest"),
        }
        services = {"pluginregistration.Registration": registration, "v1beta1.DevicePlugin": plugin}
        self._server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler(*each) for each in services.items()]
        )
        self._server.add_insecure_port(f"unix:{self._socket}")
        self._server.start()
        return self

    def __exit__(self, *_):
        self._ended.put(None)
        self._server.stop(1).wait()

    def _info(self, _request, _context):
        return M["Info"](
            type="DevicePlugin", name=RESOURCE, endpoint=str(self._socket),
            supported_versions=["v1beta1"],
        )  # fmt: skip

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
